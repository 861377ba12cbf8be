"""Ranks that do not make the same call: one named error on all of them, nothing hangs, nothing runs wrong."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cpinfer
from cpinfer.comm.axis import CountingComm
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.errors import RanksDifferError, StreamEndedError, UserError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

GRID = RankGrid(pcp_size=2, dcp_size=2)
CONFIG = {
    "dtype": "float32",
    "prefill_context_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "kv_cache_gib": 2**-7,
}
PROMPTS = [list(tokens) for tokens in prompts_of((5, 40, 9), vocab_size=128)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=4)
# Samples that end one after another.
LENGTHS = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (2, 5, 9)]

Call = Callable[[cpinfer.Engine, bool], Any]


def plain_call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
    return engine.generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(FAMILIES["qwen2"])


def outcomes(
    model: Any,
    call: Call = plain_call,
    config: dict[str, Any] | None = None,
    touch: Callable[[Any], None] = lambda model: None,
    grid: RankGrid = GRID,
) -> list[Any]:
    """What each rank returned, or the error it raised. The last rank has another config, model or call."""

    def body(topology: cpinfer.Topology) -> Any:
        is_odd_one = topology.rank == grid.world_size - 1
        own = copy.deepcopy(model)
        if is_odd_one:
            touch(own)
        parsed = parse_config({**CONFIG, **(config or {})} if is_odd_one else CONFIG)
        try:
            with cpinfer.attach(own, topology, parsed) as engine:
                return call(engine, is_odd_one)
        except Exception as error:
            return error
        finally:
            assert own.config._attn_implementation == model.config._attn_implementation

    return run_ranks(grid, body, timeout_s=20)


def assert_told(results: list[Any], told: str, kind: type[Exception] = RanksDifferError) -> None:
    assert [type(result) for result in results] == [kind] * len(results), results
    assert all(told in str(result) for result in results), results


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"block_size": 32}, "rank 1 has block_size 32, rank 0 has 16"),
        ({"max_num_seqs": 3}, "rank 1 has max_num_seqs 3, rank 0 has 256"),
        ({"max_num_batched_tokens": 64}, "rank 1 has max_num_batched_tokens 64, rank 0 has 8192"),
        ({"cp_wire_dtype": "bfloat16"}, "rank 1 has cp_wire_dtype 'bfloat16', rank 0 has 'auto'"),
        ({"decode_exchange": "ag_rs"}, "rank 1 has decode_exchange 'ag_rs', rank 0 has 'a2a'"),
        ({"context_exchange": "kv"}, "rank 1 has context_exchange 'kv', rank 0 has 'auto'"),
        ({"enable_prefix_caching": False}, "rank 1 has enable_prefix_caching False, rank 0 has True"),
        ({"cp_kv_cache_interleave_size": 3}, "rank 1 has cp_kv_cache_interleave_size 3, rank 0 has None"),
        ({"kv_cache_dtype": "fp8"}, "rank 1 has kv_cache_dtype 'fp8_e4m3', rank 0 has 'auto'"),
    ],
)
def test_configs_that_differ_are_named_when_the_engine_attaches(model: Any, config: dict[str, Any], told: str) -> None:
    assert_told(outcomes(model, config=config), told)


def test_model_configs_that_differ_beside_equal_weights_are_named_when_the_engine_attaches(model: Any) -> None:
    def touch(own: Any) -> None:
        own.config.rms_norm_eps = 0.01
        own.config._name_or_path = "elsewhere"

    assert_told(outcomes(model, touch=touch), "rank 1 has model's config.rms_norm_eps 0.01, rank 0 has 1e-06")


def test_the_same_model_may_lie_elsewhere_on_a_rank(model: Any) -> None:
    first, second = outcomes(model, touch=lambda own: setattr(own.config, "_name_or_path", "elsewhere"))
    assert [r.token_ids for r in first] == [r.token_ids for r in second]


def test_what_no_engine_reads_may_differ(model: Any) -> None:
    first, second = outcomes(model, config={"sampling": {"n": 2}, "model": "/another/mount"})
    assert [r.token_ids for r in first] == [r.token_ids for r in second]


def test_a_config_that_fits_one_rank_only_is_an_error_on_all(model: Any) -> None:
    first, second = outcomes(model, config={"prefill_context_parallel_size": 1})
    assert isinstance(first, UserError) and isinstance(second, UserError)
    assert str(first) == f"rank 1: {second}"


def test_weights_that_differ_are_named_when_the_engine_attaches(model: Any) -> None:
    def step(own: Any) -> None:  # as an optimiser step that one rank alone has made
        with torch.no_grad():
            own.model.layers[1].mlp.up_proj.weight.add_(1e-4)

    assert_told(outcomes(model, touch=step), "rank 1 has weight model.layers.1.mlp.up_proj.weight.values")
    assert_told(
        outcomes(model, touch=lambda own: own.model.norm.to(torch.bfloat16)),
        "rank 1 has weight model.norm.weight.dtype 'bfloat16', rank 0 has 'float32'",
    )


@pytest.mark.parametrize(
    ("prompts", "sampling", "told"),
    [
        (PROMPTS[:2], GREEDY, "rank 1 has prompts.count 2, rank 0 has 3"),
        (PROMPTS[::-1], GREEDY, "rank 1 has prompts[0].token_ids"),
        ([PROMPTS[0], [*PROMPTS[1][:-1], 1], PROMPTS[2]], GREEDY, "rank 1 has prompts[1].token_ids"),
        ([{"id": "a", "prompt_token_ids": PROMPTS[0]}, *PROMPTS[1:]], GREEDY, "rank 1 has prompts[0].id 'a', rank 0"),
        (PROMPTS, dataclasses.replace(GREEDY, seed=1), "rank 1 has sampling.seed 1, rank 0 has 0"),
        (PROMPTS, dataclasses.replace(GREEDY, temperature=0.5), "rank 1 has sampling.temperature 0.5, rank 0 has 0"),
        (PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=1.1), "rank 1 has sampling.repetition_penalty 1.1"),
        (PROMPTS, dataclasses.replace(GREEDY, n=2), "rank 1 has sampling.n 2, rank 0 has 1"),
        (PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=5), "rank 1 has sampling.max_new_tokens 5, rank 0 has 4"),
        (PROMPTS, dataclasses.replace(GREEDY, stop_token_ids=(7,)), "rank 1 has sampling.stop_token_ids [7], rank 0"),
        (PROMPTS, dataclasses.replace(GREEDY, top_logprobs=2), "rank 1 has sampling.top_logprobs 2, rank 0 has 0"),
    ],
)
def test_calls_that_differ_are_named_before_anything_runs(
    model: Any, prompts: list[Any], sampling: SamplingParams, told: str
) -> None:
    def call(engine: cpinfer.Engine, is_odd_one: bool) -> None:
        engine.generate(prompts if is_odd_one else PROMPTS, sampling if is_odd_one else GREEDY)

    assert_told(outcomes(model, call), told)


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (lambda engine: engine.score([(PROMPTS[0], [1])]), "rank 1 has call 'score', rank 0 has 'generate'"),
        (lambda engine: engine.generate_pooled(PROMPTS), "rank 1 has call 'generate_pooled', rank 0 has 'generate'"),
        (lambda engine: engine.weights_changed(), "rank 1 has weights_version 1, rank 0 has 0"),
    ],
)
def test_another_kind_of_call_on_one_rank_is_named(
    model: Any, before: Callable[[cpinfer.Engine], Any], told: str
) -> None:
    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        if is_odd_one:
            before(engine)
        return engine.generate(PROMPTS, GREEDY)

    assert_told(outcomes(model, call), told)


def test_an_engine_that_sleeps_on_one_rank_is_an_error_on_all(model: Any) -> None:
    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        if is_odd_one:
            engine.sleep()
        return engine.generate(PROMPTS, GREEDY)

    first, second = outcomes(model, call)
    assert isinstance(first, RanksDifferError) and "rank 1 could not begin" in str(first)
    assert isinstance(second, RuntimeError) and "call wake()" in str(second)


def test_a_bad_prompt_of_one_rank_is_an_error_on_all(model: Any) -> None:
    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        return engine.generate_pooled([PROMPTS[0], []] if is_odd_one else PROMPTS, GREEDY)

    first, second = outcomes(model, call)
    assert isinstance(first, UserError) and isinstance(second, UserError)
    assert str(first) == f"rank 1: {second}" and str(second).startswith("prompt 1: the prompt is empty")


def take_and(leave: Callable[[], bool]) -> Call:
    """Take results until `leave` says that the loop is left, on the odd rank alone."""

    def call(engine: cpinfer.Engine, is_odd_one: bool) -> int:
        taken = 0
        for _ in engine.stream(PROMPTS, LENGTHS):
            taken += 1
            if is_odd_one and leave():
                break
        return taken

    return call


def fail() -> bool:
    raise KeyError("the consumer's own")


@pytest.mark.parametrize("grid", [GRID, RankGrid(pcp_size=4, dcp_size=4)], ids=["two ranks", "four ranks"])
def test_a_consumer_that_breaks_off_alone_ends_the_stream_on_all(model: Any, grid: RankGrid) -> None:
    config = {"prefill_context_parallel_size": grid.pcp_size, "decode_context_parallel_size": grid.dcp_size}

    def body(topology: cpinfer.Topology) -> Any:
        try:
            with cpinfer.attach(copy.deepcopy(model), topology, parse_config({**CONFIG, **config})) as engine:
                return take_and(lambda: True)(engine, topology.rank == 1)
        except StreamEndedError as error:
            return error

    results = run_ranks(grid, body, timeout_s=20)
    assert_told(results, "rank(s) [1] of the replica stopped taking the results", StreamEndedError)


def test_a_consumer_that_raises_keeps_its_error_and_the_others_are_told(model: Any) -> None:
    first, second = outcomes(model, take_and(fail))
    assert isinstance(first, StreamEndedError)
    assert isinstance(second, KeyError)


def test_each_rank_gets_the_end_of_a_stream_once_and_all_may_go_on(model: Any) -> None:
    """Who broke off gets it at the next call, without waiting for others, who have it already and may have left."""

    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        try:
            take_and(lambda: True)(engine, is_odd_one)
            assert is_odd_one
            engine.generate(PROMPTS, GREEDY)
        except StreamEndedError as error:
            return str(error), [r.token_ids for r in engine.generate(PROMPTS, GREEDY)]

    first, second = outcomes(model, call)
    expected, _ = outcomes(model)
    assert first == second == (first[0], [r.token_ids for r in expected])


def test_all_may_leave_a_stream_together(model: Any) -> None:
    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        for _ in engine.stream(PROMPTS, LENGTHS):
            break
        return [r.token_ids for r in engine.generate(PROMPTS, GREEDY)]

    first, second = outcomes(model, call)
    expected, _ = outcomes(model)
    assert first == second == [r.token_ids for r in expected]


def test_a_rank_may_leave_at_the_very_last_result(model: Any) -> None:
    """There is no further step in which the others could miss it."""

    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        stream = engine.stream(PROMPTS, LENGTHS)
        for _ in PROMPTS:
            next(stream)
        if is_odd_one:
            stream.close()
        else:
            assert next(stream, None) is None
        return [r.token_ids for r in engine.generate(PROMPTS, GREEDY)]

    first, second = outcomes(model, call)
    assert first == second


def test_a_rank_may_linger_over_the_results_of_the_last_step(model: Any) -> None:
    """All steps have run: the next call finds every rank, and what is taken late is what it was."""

    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        stream = engine.stream(PROMPTS, GREEDY)
        late = [next(stream)] if is_odd_one else list(stream)
        again = engine.generate(PROMPTS, GREEDY)
        engine.weights_changed()
        late += stream
        engine.weights_changed()
        return [r.token_ids for r in late + again], [r.weights_version for r in late], engine.generate(PROMPTS, GREEDY)

    (first, versions, _), (second, late_versions, _) = outcomes(model, call)
    assert first == second
    assert versions == late_versions == [0, 0, 0]


def test_a_call_costs_one_gather_and_a_step_none_beyond_its_own(model: Any) -> None:
    traffic = []

    def body(topology: cpinfer.Topology) -> None:
        counting = CountingComm(topology.replica)
        with cpinfer.attach(
            copy.deepcopy(model), dataclasses.replace(topology, replica=counting), parse_config(CONFIG)
        ) as engine:
            before = dataclasses.replace(counting.traffic)
            engine.generate(PROMPTS, GREEDY)
            if topology.rank == 0:
                traffic.append((before.num_collectives, counting.traffic.num_all_gather - before.num_all_gather))

    run_ranks(GRID, body)
    num_steps = 1 + GREEDY.max_new_tokens - 1  # a prefill gives the first token
    assert traffic == [(2, 1 + num_steps)]


def test_pooled_batches_without_a_name_never_draw_the_same_numbers(model: Any) -> None:
    sampling = SamplingParams(max_new_tokens=8, seed=3)

    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        unnamed = [engine.generate_pooled(PROMPTS, sampling) for _ in range(2)]
        name = unnamed[0][0].id.split("/")[0]
        again = engine.generate_pooled(PROMPTS, sampling, name=name)
        return [[r.token_ids for r in results] for results in (*unnamed, again)]

    (first, other, again), _ = outcomes(model, call)
    assert first != other
    assert first == again, "a batch can be repeated by the name in its ids"
    assert outcomes(model, call)[0][0] not in (first, other), "nor in another phase"


def test_ranks_that_train_on_the_same_data_must_bring_the_same_prompts(model: Any) -> None:
    def call(engine: cpinfer.Engine, is_odd_one: bool) -> Any:
        return engine.generate_pooled(PROMPTS[1:] if is_odd_one else PROMPTS[:2], GREEDY, num_copies=2)

    assert_told(outcomes(model, call), "should bring the same prompts")


@pytest.mark.parametrize("num_copies", [0, -1, 3, 1.0, True])
def test_copies_that_do_not_divide_the_ranks_are_refused(model: Any, num_copies: Any) -> None:
    results = outcomes(model, lambda engine, _: engine.generate_pooled(PROMPTS, GREEDY, num_copies=num_copies))
    assert_told(results, f"num_copies is {num_copies}; a divisor of the replica's 2 rank(s) was wanted", UserError)


def test_a_pool_wants_a_tokenizer_for_stop_strings(model: Any) -> None:
    sampling = dataclasses.replace(GREEDY, stop=("x",))
    assert_told(outcomes(model, lambda engine, _: engine.generate_pooled(PROMPTS, sampling)), "tokenizer", UserError)


def test_an_engine_is_refused_after_its_block_and_its_streams_do_not_end_as_if_complete(model: Any) -> None:
    own = copy.deepcopy(model)
    config = parse_config({"dtype": "float32", "kv_cache_gib": 2**-7})
    with cpinfer.attach(own, config=config) as engine:
        stream = engine.stream(PROMPTS, LENGTHS)
        next(stream)
    for use in (
        lambda: engine.generate(PROMPTS, GREEDY),
        lambda: engine.score([(PROMPTS[0], [1])]),
        lambda: engine.generate_pooled(PROMPTS, GREEDY),
        lambda: engine.wake(),
        lambda: engine.weights_changed(),
        lambda: next(stream),
    ):
        with pytest.raises(RuntimeError, match="the block of this engine has ended"):
            use()
    assert not engine.is_awake
