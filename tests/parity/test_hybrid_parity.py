"""Models of linear and softmax attention through the whole engine on ranks as threads: the answers of Transformers.

Prompts whose pieces are empty, chunks of all sizes, forks, preemption, turns of sessions, streams that are left. The
faults at the end make one thing wrong each, and must be seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from thread_tp import on_ranks
from transformers import AutoConfig

import cpinfer
from cpinfer.config import JobConfig, SamplingParams
from cpinfer.engine import attach, step_plans
from cpinfer.engine.attach import config_errors, model_spec
from cpinfer.engine.request import RolloutResult
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step_plans import StepPlanner
from cpinfer.errors import UserError
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.state_cache import StateCache
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.states import StatePlace, StatePlan
from cpinfer.models.gated_delta_net import LinearHeads
from cpinfer_tools.verify import check_rollout
from every_family import WITHOUT_TP
from tiny_models import GATED_DELTA, SETTINGS, TINY, make_model, prompts_of

TOLERANCE = 1e-4
SLOW = pytest.mark.slow
# One, two homes of one rank, one home of two, two homes of two.
GRIDS = [RankGrid(), *(RankGrid(pcp_size=pcp, dcp_size=dcp) for pcp, dcp in ((2, 1), (2, 2), (4, 2)))]
SINGLE, PCP2_DCP1, PCP2_DCP2, PCP4_DCP2 = GRIDS
# Two key heads: cut by tp2, whole on every rank of tp4. The second mixes KV heads.
TP2, TP2_PCP2_DCP4, TP4 = RankGrid(tp_size=2), RankGrid(2, 2, 4), RankGrid(tp_size=4, dcp_size=2)
CONFIG: dict[str, Any] = {"cp_kv_cache_interleave_size": 3, "block_size": 4, "kv_cache_gib": 2**-8}
PROMPTS = prompts_of((1, 2, 3, 4, 63, 64, 65, 200), vocab_size=128)
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
# Layers of both kinds, the first and the last of them linear, two of them in a row.
KINDS = {"num_hidden_layers": 4, "layer_types": [*GATED_DELTA["layer_types"], *["linear_attention"] * 2]}
FAMILIES = ("qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear")


@pytest.fixture(autouse=True)
def every_prompt_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones would be dealt to ranks whole, and there would be no pieces to join."""
    monkeypatch.setattr(step_plans, "assign_prompts", lambda lens, *_: [None] * len(lens))


def name(value: Any) -> str:
    if not isinstance(value, RankGrid):
        return str(value)
    return f"tp{value.tp_size}_pcp{value.pcp_size}_dcp{value.dcp_size}"


@functools.cache
def model_of(family: str) -> Any:
    return make_model(AutoConfig.for_model(family, **{**TINY, **SETTINGS[family], **KINDS}))


@functools.cache
def continued(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    return check_rollout.generate_greedy(model_of(family), prompt, num_tokens)


def largest_difference(family: str, results: Sequence[RolloutResult], *, greedy: bool = True) -> float:
    """Of logprobs from those of the whole model; infinite where greedy tokens differ."""
    worst = 0.0
    for r in results:
        if greedy and list(r.token_ids) != continued(family, tuple(r.prompt_token_ids), len(r.token_ids)):
            return math.inf
        expected = check_rollout.score(model_of(family), r.prompt_token_ids, r.token_ids)
        worst = max(worst, (expected - torch.tensor(r.logprobs)).abs().max().item())
    return worst


def generated(
    family: str, grid: RankGrid, prompts: Sequence[Any] = PROMPTS, sampling: SamplingParams = GREEDY, **config: Any
) -> list[RolloutResult]:
    ranks = on_ranks(model_of(family), grid, lambda engine: engine.generate(prompts, sampling), **CONFIG, **config)
    assert all([r.logprobs for r in results] == [r.logprobs for r in ranks[0]] for results in ranks)
    return ranks[0]


@pytest.mark.parametrize("grid", GRIDS[1:], ids=name)
def test_prompts_may_be_dealt_whole_to_other_ranks_than_their_states(
    monkeypatch: pytest.MonkeyPatch, grid: RankGrid
) -> None:
    monkeypatch.undo()
    results = generated("qwen3_next", grid, max_num_batched_tokens=150, split=False)
    assert largest_difference("qwen3_next", results) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        *((family, grid) for grid in GRIDS for family in FAMILIES),
        *((family, grid) for grid in (TP2, TP2_PCP2_DCP4) for family in FAMILIES if family not in WITHOUT_TP),
        ("qwen3_5_text", TP4),
        pytest.param("qwen3_next", TP4, marks=SLOW),
    ],
    ids=name,
)
def test_greedy_tokens_and_logprobs_equal_transformers(family: str, grid: RankGrid) -> None:
    assert largest_difference(family, generated(family, grid)) <= TOLERANCE


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        *((PCP2_DCP2, size) for size in (1, 64)),
        (PCP4_DCP2, 33),
        *(pytest.param(grid, size, marks=SLOW) for grid in GRIDS for size in (2, 3, 7, 16, 63, 65, 130)),
    ],
    ids=name,
)
def test_prompts_may_come_in_chunks_of_any_size(grid: RankGrid, size: int) -> None:
    prompts = [*PROMPTS[:4], PROMPTS[4][:20]] if size == 1 else PROMPTS
    results = generated("qwen3_next", grid, prompts, max_num_batched_tokens=size)
    assert len(results) == len(prompts) and largest_difference("qwen3_next", results) <= TOLERANCE


@pytest.mark.parametrize("grid", [PCP2_DCP2, PCP4_DCP2, *(pytest.param(g, marks=SLOW) for g in GRIDS[:2])], ids=name)
def test_samples_of_a_prompt_each_go_on_from_its_state(grid: RankGrid) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3, n=3, max_new_tokens=6)
    named = [{"prompt_token_ids": p, "id": f"p{i}"} for i, p in enumerate(PROMPTS[2:8:2])]
    results = generated("qwen3_next", grid, named, sampling, max_num_batched_tokens=40)
    assert len({r.token_ids for r in results}) == 9, "they differ"
    assert largest_difference("qwen3_next", results, greedy=False) <= TOLERANCE
    alone = generated("qwen3_next", SINGLE, named, sampling)
    assert [r.token_ids for r in alone] == [r.token_ids for r in results]


@pytest.mark.parametrize("grid", [PCP2_DCP2, pytest.param(PCP4_DCP2, marks=SLOW)], ids=name)
def test_a_tight_pool_preempts_and_changes_no_answer(monkeypatch: pytest.MonkeyPatch, grid: RankGrid) -> None:
    """Six sequences of 32 cached tokens in pools for 72: of three at most are there blocks."""
    own_pool = attach.own_pool
    monkeypatch.setattr(attach, "own_pool", lambda *args: dataclasses.replace(own_pool(*args), num_blocks=9))
    prompts, sampling = prompts_of([9] * 6, vocab_size=128), dataclasses.replace(GREEDY, max_new_tokens=24)

    def body(engine: cpinfer.Engine) -> tuple[list[RolloutResult], int]:
        return engine.generate(prompts, sampling), engine.stats.num_preemptions

    [(results, num_preemptions), *_] = on_ranks(model_of("qwen3_next"), grid, body, **CONFIG)
    assert num_preemptions > 0
    assert len(results) == 6 and largest_difference("qwen3_next", results) <= TOLERANCE


def test_more_requests_than_states_wait_for_one() -> None:
    results = generated("qwen3_next", PCP2_DCP2, max_num_seqs=2)
    assert largest_difference("qwen3_next", results) <= TOLERANCE


Turns = list[tuple[RolloutResult, int, int]]


def turns_of(engine: cpinfer.Engine, prompt: Sequence[int], given: Sequence[Sequence[int]]) -> Turns:
    """Every turn of a session of this rank, with the prompt tokens found and computed until it ended."""
    session, found = engine.open_session(prompt), []
    for new in given:
        engine.add(list(new), GREEDY, session=session)
        results: list[RolloutResult] = []

        def condition(outputs: list[cpinfer.RequestOutput], results: list[RolloutResult] = results) -> bool:
            results += [output.result for output in outputs if output.result is not None]
            return bool(results)

        engine.run_until(condition)
        stats = engine._core.scheduler.stats
        found.append((results[0], stats.num_cached_prefill_tokens, stats.num_computed_prefill_tokens))
    engine.close_session(session)
    engine.step()
    engine._core.scheduler.check_integrity()
    return found


GIVEN = [[], [5], [6, 7, 8, 9], prompts_of((40,), vocab_size=128)[0]]


@pytest.mark.parametrize("grid", [PCP2_DCP2, *(pytest.param(g, marks=SLOW) for g in (PCP2_DCP1, PCP4_DCP2))], ids=name)
def test_turns_of_a_session_go_on_from_its_state_and_compute_only_what_is_new(grid: RankGrid) -> None:
    ranks = on_ranks(
        model_of("qwen3_next"), grid, lambda engine: turns_of(engine, PROMPTS[6], GIVEN), **CONFIG,
        max_num_batched_tokens=24,
    )  # fmt: skip
    for turns in ranks:
        assert largest_difference("qwen3_next", [result for result, *_ in turns]) <= TOLERANCE
    # The first turns of all are samples of one prompt.
    num_new = len(PROMPTS[6]) + len(ranks) * sum(len(new) + 1 for new in GIVEN[1:])
    assert {turns[-1][2] for turns in ranks} == {num_new}
    assert min(turns[-1][1] for turns in ranks) > 3 * len(PROMPTS[6])


def test_a_session_whose_state_has_gone_is_computed_anew() -> None:
    for config in ({"max_session_tokens": 0}, {"max_num_seqs": 1}):
        [turns] = on_ranks(
            model_of("qwen3_next"), SINGLE, lambda engine: turns_of(engine, PROMPTS[4], GIVEN), **CONFIG, **config
        )
        assert largest_difference("qwen3_next", [result for result, *_ in turns]) <= TOLERANCE
    assert turns[-1][1] > 0


def test_without_a_state_cache_no_prefix_is_found() -> None:
    def body(engine: cpinfer.Engine) -> list[RolloutResult]:
        results = [*engine.generate([PROMPTS[7]], GREEDY), *engine.generate([[*PROMPTS[7], 3]], GREEDY)]
        assert engine.stats.num_cached_prefill_tokens == 0
        return results

    for results in on_ranks(model_of("qwen3_next"), PCP2_DCP2, body, **CONFIG):
        assert largest_difference("qwen3_next", results) <= TOLERANCE


DOCUMENT = PROMPTS[7][:120]
ASKED = [[*DOCUMENT, *PROMPTS[4][:30]], [*DOCUMENT, *PROMPTS[5][:35]], [*DOCUMENT, *PROMPTS[6][:28]]]
Reused = tuple[list[RolloutResult], list[int], int]


def reusing(engine: cpinfer.Engine) -> Reused:
    """Prompts that begin alike, one after another; the first again, in three samples; and all after other weights.

    Tokens found cached in each call, and the states kept at the end.
    """
    results: list[RolloutResult] = []
    found: list[int] = []

    def generate(prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> None:
        results.extend(engine.generate([prompt], sampling))
        found.append(engine.stats.num_cached_prefill_tokens)

    for prompt in ASKED:
        generate(prompt)
    generate(ASKED[0], dataclasses.replace(GREEDY, n=3))
    engine.sleep()
    engine.wake()
    generate(ASKED[0])
    states = engine._core.scheduler.states
    return results, found, 0 if states is None else len(states)


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("qwen3_next", PCP2_DCP2),
        ("qwen3_next", PCP4_DCP2),
        *(pytest.param("qwen3_next", g, marks=SLOW) for g in (SINGLE, PCP2_DCP1, TP2_PCP2_DCP4)),
        *(pytest.param(family, PCP2_DCP2, marks=SLOW) for family in ("qwen3_5_text", "olmo_hybrid", "kimi_linear")),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_prompts_that_begin_alike_go_on_from_the_state_behind_what_they_share(family: str, grid: RankGrid) -> None:
    ranks = on_ranks(model_of(family), grid, reusing, **CONFIG, state_cache_gib=2**-8)
    unit = 12 * grid.dcp_size
    shared = len(DOCUMENT) // unit * unit
    again = (len(ASKED[0]) - 1) // unit * unit
    for results, found, num_states in ranks:
        assert len(results) == 7 and largest_difference(family, results) <= TOLERANCE
        # The second finds where the first parts from it, and leaves a state there for the third.
        # Samples are dealt over the homes, each of which would have to know the KV.
        assert found == [0, 0, shared, again if grid.num_homes == 1 else 0, 0] and num_states == 1


def test_a_state_cache_has_room_for_as_many_states_as_its_bytes_buy() -> None:
    spec = model_spec(model_of("qwen3_next"))
    assert spec.states is not None
    per_state = spec.states.bytes_per_sequence("float32")
    small = {"state_cache_gib": per_state / 2**30}

    def body(engine: cpinfer.Engine) -> tuple[Reused, int]:
        return reusing(engine), engine.kv_pool_bytes

    [((results, found, _), num_bytes)] = on_ranks(model_of("qwen3_next"), SINGLE, body, **CONFIG, **small)
    assert largest_difference("qwen3_next", results) <= TOLERANCE
    # One place: the state where the second parts gives way to that behind the second.
    assert found == [0, 0, 0, 0, 0]
    [(_, without)] = on_ranks(model_of("qwen3_next"), SINGLE, body, **CONFIG)
    assert num_bytes - without == per_state
    with pytest.raises(UserError, match=f"buy no state of {per_state} bytes. Raise it, or set it to 0"):
        on_ranks(model_of("qwen3_next"), SINGLE, body, **CONFIG, state_cache_gib=0.9 * per_state / 2**30)


def test_the_state_behind_another_number_of_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    used = StateCache.use
    monkeypatch.setattr(StateCache, "use", lambda self, key: used(self, next(iter(self._places))))
    [(results, found, _)] = on_ranks(model_of("qwen3_next"), SINGLE, reusing, **CONFIG, state_cache_gib=2**-8)
    assert max(found) > 0 and largest_difference("qwen3_next", results) > 100 * TOLERANCE


def test_given_answers_are_scored_in_chunks_as_transformers_does() -> None:
    pairs = [(PROMPTS[5], PROMPTS[6][:30]), (PROMPTS[0], PROMPTS[4])]
    found = on_ranks(
        model_of("qwen3_next"), PCP2_DCP2, lambda e: e.score(pairs), **CONFIG, max_num_batched_tokens=25
    )[0]  # fmt: skip
    for (prompt, answer), result in zip(pairs, found, strict=True):
        expected = check_rollout.score(model_of("qwen3_next"), prompt, answer)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE


def beside_a_stream_that_is_left(engine: cpinfer.Engine) -> list[RolloutResult]:
    """Requests that go on while all ranks leave a stream, one after its first result."""
    for i, prompt in enumerate(PROMPTS[3:6]):
        engine.add({"prompt_token_ids": prompt, "id": f"{engine.topology.rank}/{i}"}, GREEDY)
    for _ in engine.stream([PROMPTS[6], PROMPTS[7]], [GREEDY, dataclasses.replace(GREEDY, max_new_tokens=3)]):
        break
    results: list[RolloutResult] = []

    def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
        results.extend(output.result for output in outputs if output.result is not None)
        return len(results) == 3

    engine.run_until(condition)
    return results


def test_a_step_that_nobody_took_the_results_of_does_not_advance_a_state_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def left() -> list[RolloutResult]:
        ranks = on_ranks(model_of("qwen3_next"), PCP2_DCP2, beside_a_stream_that_is_left, **CONFIG)
        return [result for results in ranks for result in results]

    results = left()
    assert len(results) == 6 and largest_difference("qwen3_next", results) <= TOLERANCE
    monkeypatch.setattr(Scheduler, "restarted", lambda self, version: self)  # negative control
    results = left()
    assert largest_difference("qwen3_next", results) > 100 * TOLERANCE


def test_an_engine_that_has_slept_computes_states_anew() -> None:
    def body(engine: cpinfer.Engine) -> list[RolloutResult]:
        session = engine.open_session(PROMPTS[4])
        results: list[RolloutResult] = []
        for new in ([], [4, 4]):
            engine.add(new, GREEDY, session=session)
            count = len(results) + 1

            def condition(outputs: list[cpinfer.RequestOutput], count: int = count) -> bool:
                results.extend(output.result for output in outputs if output.result is not None)
                return len(results) == count

            engine.run_until(condition)
            engine.sleep()
            engine.wake()
        return results

    for results in on_ranks(model_of("qwen3_next"), PCP2_DCP2, body, **CONFIG):
        assert largest_difference("qwen3_next", results) <= TOLERANCE


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"deterministic": True}, "deterministic mode with linear attention"),
        ({"cuda_graphs": True}, "CUDA graphs with linear attention"),
        (
            {
                "decode_exchange": "replicate_q",
                "prefill_context_parallel_size": 2,
                "decode_context_parallel_size": 2,
            },
            "replicate_q.* with linear attention",
        ),
    ],
)
def test_what_does_not_run_with_states_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    [error] = config_errors(model_spec(model_of("qwen3_next")), JobConfig(**keys))
    assert re.search(words, error)


# --- what is made wrong on purpose ---


def planned_otherwise(change: Callable[[StatePlan], StatePlan]) -> Callable[[pytest.MonkeyPatch], None]:
    def put_in(monkeypatch: pytest.MonkeyPatch) -> None:
        planned = step_plans.plan_states
        monkeypatch.setattr(step_plans, "plan_states", lambda *args, **words: change(planned(*args, **words)))

    return put_in


def composed_backwards(plan: StatePlan) -> StatePlan:
    chains = tuple(dataclasses.replace(c, links=(c.links[0], *c.links[:0:-1])) for c in plan.chains)
    return dataclasses.replace(plan, chains=chains)


def without_tails(plan: StatePlan) -> StatePlan:
    return dataclasses.replace(plan, tails=plan.tails * 0 - 1)


def without_a_past(plan: StatePlan) -> StatePlan:
    return dataclasses.replace(plan, chains=tuple(dataclasses.replace(c, reads=()) for c in plan.chains))


def of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    place = StepPlanner._state_place

    def other(self: StepPlanner, request: Any) -> StatePlace:
        found = place(self, request)
        return StatePlace(found.pcp_rank, found.slot ^ 1)

    monkeypatch.setattr(StepPlanner, "_state_place", other)


def all_free_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = KVHome.take_state
    monkeypatch.setattr(KVHome, "take_state", lambda self: dataclasses.replace(taken(self), slot=0))
    monkeypatch.setattr(KVHome, "release", lambda self, blocks, state=None: self.pool.release(blocks))
    monkeypatch.setattr(KVHome, "check_integrity", lambda self, *_: None)


def channels_of_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LinearHeads.of
    monkeypatch.setattr(
        LinearHeads, "of", lambda layout, tp_size=1, tp_rank=0: dataclasses.replace(
            whole(layout, tp_size, tp_rank), channels=whole(layout, tp_size).channels
        ),
    )  # fmt: skip


def decays_of_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LinearHeads.of
    monkeypatch.setattr(
        LinearHeads, "of", lambda layout, tp_size=1, tp_rank=0: dataclasses.replace(
            whole(layout, tp_size, tp_rank), v_heads=whole(layout, tp_size).v_heads
        ),
    )  # fmt: skip


FAULTS = {
    "another order": planned_otherwise(composed_backwards),
    "dropped tails": planned_otherwise(without_tails),
    "no past": planned_otherwise(without_a_past),
    "the state of another row": of_another_row,
    "one state for all": all_free_to_share,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    FAULTS[fault](monkeypatch)
    assert largest_difference("qwen3_next", generated("qwen3_next", PCP2_DCP2)) > 100 * TOLERANCE


@pytest.mark.parametrize("of_rank_0", [channels_of_the_first_rank, decays_of_the_first_rank])
def test_heads_of_another_rank_are_seen(monkeypatch: pytest.MonkeyPatch, of_rank_0: Any) -> None:
    of_rank_0(monkeypatch)
    assert largest_difference("qwen3_5_text", generated("qwen3_5_text", TP2)) > 100 * TOLERANCE
