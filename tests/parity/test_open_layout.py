"""The layout of decode left open ("auto"): what is chosen, by all ranks alike, and that answers are the same."""

import copy
import threading
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest

import cpinfer
from cpinfer.comm.axis import CountingComm
from cpinfer.comm.threads import run_ranks
from cpinfer.config import EngineConfig, JobConfig, SamplingParams
from cpinfer.engine import layout_choice
from cpinfer.engine.step_runner import StepRunner
from cpinfer.errors import RanksDifferError, UserError
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.decode_choice import DecodeRates
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

GRID = RankGrid(pcp_size=2, dcp_size=2)
PROMPTS = prompts_of((30, 5, 12, 9), vocab_size=128)
SAMPLING = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
# A home per rank is the faster, or all ranks together are.
APART, TOGETHER = ({1: DecodeRates(a, 0.0, 0.0), 2: DecodeRates(b, 0.0, 0.0)} for a, b in ((1.0, 2.0), (2.0, 1.0)))


def config_of(**keys):
    sizes = {"prefill_context_parallel_size": 2, "decode_context_parallel_size": "auto"}
    return JobConfig(**{"dtype": "float32", "kv_cache_gib": 0.001, "block_size": 4, **sizes, **keys})


def with_engine(body, family="qwen2", grid=GRID, config_for=None, **keys):
    """What `body` gives on every rank, each with an engine over the same weights."""
    model = make_model(copy.deepcopy(FAMILIES[family]))

    def on_rank(topology):
        config = config_of(**keys) if config_for is None else config_for(topology.rank)
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            return body(engine)

    return run_ranks(grid, on_rank)


def shards(engine):
    return engine._core.scheduler.sharding.num_shards


def rated(monkeypatch, rates):
    monkeypatch.setattr("cpinfer.engine.step_factory.measured_rates", lambda *given: rates)


def tokens_of(results):
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def expected():
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    with cpinfer.attach(model, config=JobConfig(dtype="float32", kv_cache_gib=0.001)) as engine:
        return tokens_of(engine.generate(PROMPTS, SAMPLING))


@pytest.mark.parametrize(("rates", "chosen"), [(APART, 1), (TOGETHER, 2)], ids=["apart", "together"])
def test_the_faster_layout_is_chosen_for_a_phase_and_the_answers_are_the_same(monkeypatch, expected, rates, chosen):
    rated(monkeypatch, rates)

    def body(engine):
        return tokens_of(engine.generate(PROMPTS, SAMPLING)), shards(engine), engine.kv_capacity_tokens

    found = with_engine(body)
    assert [(tokens, n) for tokens, n, _ in found] == [(expected, chosen)] * 2
    assert len({capacity for _, _, capacity in found}) == 1, "that of all shards, whatever was chosen"


@pytest.mark.parametrize(("share", "chosen"), [(1.0, 1), (0.98, 1), (0.95, 2)])
def test_of_layouts_that_are_about_as_fast_the_one_without_collectives_is_chosen(monkeypatch, share, chosen):
    rated(monkeypatch, {1: DecodeRates(1.0, 0.0, 0.0), 2: DecodeRates(share, 0.0, 0.0)})

    def body(engine):
        engine.generate(PROMPTS, SAMPLING)
        return shards(engine)

    assert with_engine(body) == [chosen] * 2


def test_ranks_whose_clocks_differ_choose_alike(monkeypatch):
    """One finds shards slow, the other fast; all take the longest times that any of them had."""
    numbers = count()
    monkeypatch.setattr(layout_choice, "_seconds_of", lambda runner, requests: 1.0 + next(numbers) % 7)
    rates = []
    made = layout_choice.LayoutChoice

    class Noted(made):
        def __init__(self, layouts, found, empty):
            rates.append(found)
            super().__init__(layouts, found, empty)

    monkeypatch.setattr("cpinfer.engine.step_factory.LayoutChoice", Noted)
    found = with_engine(lambda engine: (tokens_of(engine.generate(PROMPTS, SAMPLING)), shards(engine)))
    assert found[0] == found[1]
    assert rates[0] == rates[1]


def rates_by(monkeypatch, seconds_of):
    """The rates that ranks find, where rehearsals take what `seconds_of` says of requests and those before."""
    rates, num_timed = [], Counter()

    def timed(runner, requests):
        rank = threading.get_ident()
        num_timed[rank] += 1
        return seconds_of(requests, num_timed[rank] - 1)

    def noted(*given):
        rates.append(measured_rates(*given))
        return rates[-1]

    measured_rates = layout_choice.measured_rates
    monkeypatch.setattr(layout_choice, "_seconds_of", timed)
    monkeypatch.setattr("cpinfer.engine.step_factory.measured_rates", noted)
    with_engine(lambda engine: None)
    monkeypatch.undo()
    assert len(rates) == 2 and rates[0] == rates[1]
    return rates[0]


def test_what_slows_the_machine_for_a_while_slows_no_layout_alone(monkeypatch):
    def seconds_of(requests, num_before):
        return 1 + 0.1 * len(requests) + 0.01 * len(requests[0].prompt.token_ids)

    def slowed(requests, num_before):
        return seconds_of(requests, num_before) * (3 if num_before < 6 * 7 else 1)

    quiet, busy = rates_by(monkeypatch, seconds_of), rates_by(monkeypatch, slowed)
    assert quiet == busy
    assert quiet[1].row_s > 0 and quiet[2].key_s > 0


def test_memory_that_is_measured_has_been_written(monkeypatch):
    """What was never written is one page of zeros, which costs next to nothing to read."""
    events, clear, rehearse = [], PagedKVCache.clear, StepRunner.rehearse

    def cleared(cache, num_blocks=None):
        events.append(("clear", num_blocks))
        clear(cache, num_blocks)

    def rehearsed(runner, requests):
        events.append(("read", max(block for request in requests for block in request.blocks)))
        rehearse(runner, requests)

    monkeypatch.setattr(PagedKVCache, "clear", cleared)
    monkeypatch.setattr(StepRunner, "rehearse", rehearsed)
    with_engine(lambda engine: None)
    (written,) = {n for kind, n in events if kind == "clear"}
    assert written == 1 + max(block for kind, block in events if kind == "read")
    kinds = [kind for kind, _ in events]
    assert kinds.index("clear") < kinds.index("read")


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt_bigcode", {}),  # whose 512 positions are learnt, and the pool holds more
        ("qwen3_next", {"max_num_seqs": 2, "max_model_len": 6}),  # whose states have two places
        ("qwen2", {"max_num_seqs": 1, "kv_cache_gib": 2**-19, "max_model_len": 6}),  # of two blocks
        ("qwen2", {"max_num_seqs": 1, "kv_cache_gib": 2**-20, "max_model_len": 6}),  # of one
    ],
)
def test_no_more_is_measured_than_there_is_room_for(family, keys):
    """Ranks would read beyond the end of what they hold."""
    sampling, grid = replace(SAMPLING, max_new_tokens=2), RankGrid(pcp_size=4, dcp_size=4)
    found = with_engine(
        lambda engine: tokens_of(engine.generate([[1, 2, 3]], sampling)),
        family,
        grid,
        **{"prefill_context_parallel_size": 4, "kv_cache_gib": 0.02, **keys},
    )
    assert len({tuple(map(tuple, tokens)) for tokens in found}) == 1 and len(found[0][0]) == 2


def test_a_request_for_the_memory_of_all_ranks_is_held_and_those_under_way_are_computed_anew(monkeypatch):
    rated(monkeypatch, APART)
    long = prompts_of((300,), vocab_size=128)[0]  # one rank's pool holds 248 tokens

    def body(engine):
        assert len(long) + 6 <= engine.kv_capacity_tokens
        short = [engine.add(prompt, SAMPLING) for prompt in PROMPTS] if engine.topology.rank == 0 else []
        engine.step(), engine.step()
        before = shards(engine)
        late = [engine.add(long, SAMPLING)] if engine.topology.rank == 0 else []
        outputs, left = {}, {*short, *late}

        def has_all(new):
            for output in new:
                if output.result is not None:
                    outputs[output.request_id] = output.result.token_ids
                    left.discard(output.request_id)
            return not left

        engine.run_until(has_all)
        return before, shards(engine), [outputs[i] for i in short], bool(late) and len(outputs[late[0]])

    first, second = with_engine(body, kv_cache_gib=6e-5)
    assert first[:2] == second[:2] == (1, 2)
    assert first[3] == 6
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    with cpinfer.attach(model, config=JobConfig(dtype="float32", kv_cache_gib=0.001)) as engine:
        assert first[2] == tokens_of(engine.generate(PROMPTS, SAMPLING))


def test_what_is_cached_and_sessions_keep_an_engine_where_it_is(monkeypatch):
    """A little faster is not worth what would be computed anew, nor is anything worth the KV of sessions."""
    rates = {1: DecodeRates(1.0, 0.0, 0.0), 2: DecodeRates(1.1, 0.05, 0.0)}
    rated(monkeypatch, {1: replace(rates[2], first_s=2 * rates[2].first_s), 2: rates[2]})

    def body(engine):
        engine.generate(PROMPTS, SAMPLING)
        engine._core.layouts._rates = rates
        engine.generate(PROMPTS, SAMPLING)
        cached = shards(engine)
        engine.weights_changed()
        engine.generate(PROMPTS, SAMPLING)
        forgotten = shards(engine)
        engine._core.layouts._rates = TOGETHER
        session = engine.open_session(PROMPTS[0]) if engine.topology.rank == 0 else None
        engine.weights_changed()

        def turn(prompt):
            left = {engine.add(prompt, SAMPLING, session=session)} if session is not None else set()
            engine.run_until(lambda new: not left.difference_update(o.request_id for o in new if o.result) and not left)

        turn([])
        began = shards(engine)
        engine._core.layouts._rates = APART
        turn([3, 4])
        kept = shards(engine)
        if session is not None:
            engine.close_session(session)
        return cached, forgotten, began, kept

    assert with_engine(body) == [(2, 1, 2, 2)] * 2


@pytest.mark.parametrize(
    "family", ["qwen3_next", *(pytest.param(f, marks=pytest.mark.slow) for f in ("deepseek_v2", "gpt_oss"))]
)
def test_states_latents_and_windows_decode_either_way_and_are_measured(monkeypatch, family):
    """By real measurements; then once in either layout, in one engine."""

    def body(engine):
        found = []
        for rates in (None, APART, TOGETHER, APART):
            if rates is not None:
                engine._core.layouts._rates = rates
            engine.weights_changed()
            found.append(tokens_of(engine.generate(PROMPTS, SAMPLING)))
        return found, engine._core.layouts._rates

    for found, _ in with_engine(body, family):
        assert found == [found[0]] * 4


def test_shards_of_the_deterministic_mode_may_be_left_open(monkeypatch):
    rated(monkeypatch, APART)

    def body(engine):
        found = []
        for rates in (APART, TOGETHER):
            engine._core.layouts._rates = rates
            engine.weights_changed()
            found.append([(r.token_ids, r.logprobs) for r in engine.generate(PROMPTS, SAMPLING)])
        return found

    for apart, together in with_engine(body, deterministic=True, deterministic_kv_shards=2):
        assert apart == together


def test_ranks_of_which_one_leaves_the_layout_open_do_not_begin():
    closed = JobConfig(dtype="float32", kv_cache_gib=0.001, block_size=4)

    with pytest.raises(RanksDifferError, match="dcp is open"):
        with_engine(lambda engine: None, config_for=lambda rank: closed if rank else config_of())


def test_a_topology_with_less_than_what_it_may_choose_from_is_refused():
    with pytest.raises(UserError, match="says dcp=2, the topology dcp=1"):
        with_engine(lambda engine: None, grid=RankGrid(pcp_size=2, dcp_size=1))


def test_alone_and_for_an_engines_own_config_nothing_is_open():
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    alone = {"decode_context_parallel_size": "auto", "kv_cache_gib": 0.001, "dtype": "float32"}
    for config in (alone, EngineConfig(dtype="float32", kv_cache_gib=0.001)):
        with cpinfer.attach(model, config=config) as engine:
            assert engine._core.layouts is None


def test_rates_are_measured_once_for_many_engines_and_anew_unless_all_ranks_know_them(monkeypatch):
    """Ranks of which one has forgotten would else wait for each other."""
    model, measured = make_model(copy.deepcopy(FAMILIES["qwen2"])), layout_choice.measured_rates
    calls = []

    def counted(steps, layouts, *limits):
        calls.append(layouts[0].topology.rank)
        return measured(steps, layouts, *limits)

    monkeypatch.setattr("cpinfer.engine.step_factory.measured_rates", counted)

    def body(topology):
        own = copy.deepcopy(model)
        for phase in range(3):
            if phase == 2 and topology.rank == 1:
                topology.measured.clear()
            with cpinfer.attach(own, topology, config_of()) as engine:
                engine.generate(PROMPTS, SAMPLING)

    run_ranks(GRID, body)
    assert sorted(calls) == [0, 0, 1, 1]


def test_a_short_phase_of_homes_has_a_third_of_the_collectives(monkeypatch):
    """Two layers, six tokens: what is left is a gather of K and V per layer, one of tokens per step, and the calls'."""
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))

    def collectives(rates):
        rated(monkeypatch, rates)

        def body(topology):
            pcp = CountingComm(topology.pcp)
            counted = replace(topology, pcp=pcp, dcp=pcp, replica=CountingComm(topology.replica, pcp.traffic))
            with cpinfer.attach(copy.deepcopy(model), counted, config_of()) as engine:
                engine.generate(PROMPTS, SAMPLING)
            return pcp.traffic.num_collectives

        return run_ranks(GRID, body)

    apart, together = collectives(APART), collectives(TOGETHER)
    assert apart == [1 + 1 + 1 + 2 + 6] * 2  # attach, wake, generate; prefill; tokens
    assert together == [a + 5 * 2 * 2 for a in apart]
