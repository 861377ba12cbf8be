"""Which experts tokens went through: in every layout those that Transformers' routers choose in one forward of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_parity import grid_name
from thread_tp import on_ranks

import cpinfer
from cpinfer.comm.threads import ThreadComm
from cpinfer.config import SamplingParams
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import RolloutResult
from cpinfer.kv_cache.expert_record import ExpertRecord
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.prefill import PrefillSplit
from cpinfer.layout.told_rows import ToldRows
from routers import experts_of, num_other_experts
from tiny_models import FAMILIES, make_model, prompts_of

FAMILIES_WITH_EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"]
GRIDS = [
    RankGrid(),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(pcp_size=2, dcp_size=1),
    RankGrid(tp_size=2),
    RankGrid(tp_size=2, pcp_size=2, dcp_size=4),
]
TP1, PCP2 = GRIDS[:2]
# The first is split over pcp ranks, each of which takes a piece of its head and one of its tail.
PROMPTS = prompts_of((250, 5, 40), vocab_size=128)
SAMPLING = SamplingParams(temperature=1, max_new_tokens=6, n=2, seed=3, routed_experts=True)
CONFIG: dict[str, Any] = {"kv_cache_gib": 2**-8, "block_size": 4}


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return make_model(FAMILIES["mixtral"])


def generate(model: Any, grid: RankGrid, sampling: SamplingParams = SAMPLING, **config: Any) -> list[RolloutResult]:
    """On every rank the same; those of the first."""
    first, *others = on_ranks(model, grid, lambda engine: engine.generate(PROMPTS, sampling), **CONFIG, **config)
    for other in others:
        assert all(np.array_equal(a.routed_experts, b.routed_experts) for a, b in zip(first, other, strict=True))
    return first


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("family", FAMILIES_WITH_EXPERTS)
def test_experts_of_every_token_are_those_of_transformers(family: str, grid: RankGrid) -> None:
    model = make_model(FAMILIES[family])
    results = generate(model, grid)
    assert [num_other_experts(model, result) for result in results] == [0] * len(results)
    # Samples of one prompt go other ways: who reports those of another sample would be seen.
    assert not np.array_equal(results[0].routed_experts, results[1].routed_experts)


@pytest.mark.parametrize("tokens", [16, 37, 200])
@pytest.mark.parametrize("grid", [TP1, PCP2, RankGrid(pcp_size=2, dcp_size=1)], ids=grid_name)
def test_chunks_change_nothing(mixtral: Any, grid: RankGrid, tokens: int) -> None:
    results = generate(mixtral, grid, max_num_batched_tokens=tokens)
    assert [num_other_experts(mixtral, result) for result in results] == [0] * len(results)


@pytest.mark.parametrize("exchange", ["ag_rs", "replicate_q"])
def test_no_exchange_of_decode_states_changes_anything(mixtral: Any, exchange: str) -> None:
    results = generate(mixtral, PCP2, decode_exchange=exchange)
    assert [num_other_experts(mixtral, result) for result in results] == [0] * len(results)


in_order = ToldRows.of_prompts


def tail_first(split: PrefillSplit, prompts: list[int]) -> ToldRows:
    """As if each rank packed the piece of the tail before that of the head."""
    told = in_order(split, prompts)
    rows = told.rows.copy()
    for rank in range(split.pcp_size):
        rows[told.ranks == rank] = np.roll(rows[told.ranks == rank], len(rows[told.ranks == rank]) // 2)
    return ToldRows(told.ranks, rows)


@pytest.mark.parametrize("grid", [TP1, PCP2], ids=grid_name)
@pytest.mark.parametrize("fault", ["pieces", "positions", "places"])
def test_a_wrong_order_of_pieces_and_a_position_off_by_one_are_seen(
    mixtral: Any, grid: RankGrid, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ExpertRecord.add
    if fault == "pieces":
        monkeypatch.setattr("cpinfer.engine.step_plans.ToldRows.of_prompts", tail_first)
    elif fault == "positions":
        monkeypatch.setattr(ExpertRecord, "add", lambda self, start, e: add(self, start, np.roll(e, 1, axis=0)))
    else:  # as if a rank sent one row
        monkeypatch.setattr(ToldRows, "places", property(lambda self: np.zeros_like(self.rows)))
    [first, *_] = generate(mixtral, grid)
    assert num_other_experts(mixtral, first) > 10


def test_a_preempted_request_keeps_the_experts_of_what_was_run(mixtral: Any) -> None:
    prompts, sampling = prompts_of([9] * 6, vocab_size=128), replace(SAMPLING, max_new_tokens=12)

    def body(engine: Engine) -> tuple[list[RolloutResult], int]:
        return engine.generate(prompts, sampling), engine.stats.num_preemptions

    for grid in (TP1, PCP2):
        tight = {**CONFIG, "kv_cache_gib": 2**-16 / grid.dcp_size}
        [(results, num_preemptions), *_] = on_ranks(mixtral, grid, body, **tight)
        assert num_preemptions > 0
        assert [num_other_experts(mixtral, result) for result in results] == [0] * len(results)


@pytest.mark.parametrize("grid", [TP1, PCP2], ids=grid_name)
def test_what_others_have_cached_is_run_again_for_who_asks(mixtral: Any, grid: RankGrid) -> None:
    plain = replace(SAMPLING, routed_experts=False)

    def body(engine: Engine) -> tuple[list[RolloutResult], list[int]]:
        cached = []
        for sampling in (plain, plain, SAMPLING):
            results = engine.generate(PROMPTS[:1], sampling)
            cached.append(engine.stats.num_cached_prefill_tokens)
            assert all((r.routed_experts is None) != sampling.routed_experts for r in results)
        return results, cached

    [(results, cached), *_] = on_ranks(mixtral, grid, body, **CONFIG)
    assert cached[1] > cached[2] == 0
    assert [num_other_experts(mixtral, result) for result in results] == [0, 0]


@pytest.mark.parametrize("grid", [TP1, PCP2, RankGrid(pcp_size=2, dcp_size=1)], ids=grid_name)
def test_what_is_cached_with_its_experts_is_not_run_again(mixtral: Any, grid: RankGrid) -> None:
    longer = [*PROMPTS[0], *PROMPTS[2]]

    def body(engine: Engine) -> list[tuple[RolloutResult, int]]:
        found = []
        for prompt, n in ((PROMPTS[0], 2), (longer, 5)):
            results = engine.generate(prompt, replace(SAMPLING, n=n))
            found += [(result, engine.stats.num_computed_prefill_tokens) for result in results]
        return found

    first, *_ = on_ranks(mixtral, grid, body, **CONFIG, max_num_seqs=2)
    assert [num_other_experts(mixtral, result) for result, _ in first] == [0] * 7
    # Five samples in three waves: the prompt is run once, but for what is no whole unit.
    assert first[0][1] == 250 and 40 <= first[2][1] < 40 + 3 * 8 * 2


@pytest.mark.parametrize("grid", [TP1, PCP2], ids=grid_name)
def test_who_asks_may_run_beside_who_does_not(mixtral: Any, grid: RankGrid) -> None:
    each = [SAMPLING, replace(SAMPLING, routed_experts=False), SAMPLING]
    first, *_ = on_ranks(mixtral, grid, lambda engine: engine.generate(PROMPTS, each), **CONFIG)
    assert [r.routed_experts is None for r in first] == [False] * 2 + [True] * 2 + [False] * 2
    assert [num_other_experts(mixtral, r) for r in first if r.routed_experts is not None] == [0] * 4
    alike = [{"prompt_token_ids": PROMPTS[0], "id": str(i)} for i in range(2)]
    first, *_ = on_ranks(mixtral, grid, lambda engine: engine.generate(alike, each[:2]), **CONFIG)
    assert [r.routed_experts is None for r in first] == [False] * 2 + [True] * 2
    assert [num_other_experts(mixtral, r) for r in first[:2]] == [0] * 2


def turns(engine: Engine, asks: list[bool], kept: int | None = None) -> list[tuple[RolloutResult, int]]:
    """The turns of a session of rank 0, and how many tokens of each were found cached."""
    is_first = engine.topology.rank == 0
    results: list[RolloutResult] = []
    cached: list[int] = []
    session = engine.open_session(PROMPTS[0]) if is_first else None
    for i, wants in enumerate(asks):
        before = engine.load.stats.num_cached_prefill_tokens
        if is_first:
            engine.add(PROMPTS[2][i:] if i else [], replace(SAMPLING, n=1, routed_experts=wants), session=session)

        def has_ended(outputs: list[cpinfer.RequestOutput], wanted: int = i + 1) -> bool:
            results.extend(output.result for output in outputs if output.result is not None)
            return not is_first or len(results) == wanted

        engine.run_until(has_ended)
        cached.append(engine.load.stats.num_cached_prefill_tokens - before)
    if session is not None:
        engine.close_session(session)
    return list(zip(results, cached, strict=False))


@pytest.mark.parametrize("kept", [None, 0], ids=["kept", "given up"])
@pytest.mark.parametrize("grid", [TP1, PCP2], ids=grid_name)
def test_a_turn_has_the_experts_of_all_turns_before_it(mixtral: Any, grid: RankGrid, kept: int | None) -> None:
    config = {**CONFIG, "max_session_tokens": kept}
    first, *_ = on_ranks(mixtral, grid, lambda engine: turns(engine, [True, True, True]), **config)
    assert [num_other_experts(mixtral, result) for result, _ in first] == [0] * 3
    if kept is None:  # nothing of it is run twice
        assert [cached for _, cached in first] == [0, *(len(r.prompt_token_ids) + 5 for r, _ in first[:2])]


@pytest.mark.parametrize("grid", [TP1, PCP2], ids=grid_name)
def test_a_turn_that_asks_after_one_that_did_not_is_run_whole(mixtral: Any, grid: RankGrid) -> None:
    first, *_ = on_ranks(mixtral, grid, lambda engine: turns(engine, [False, False, True, True]), **CONFIG)
    assert [result.routed_experts is None for result, _ in first] == [True, True, False, False]
    assert [num_other_experts(mixtral, result) for result, _ in first[2:]] == [0] * 2
    assert [cached > 0 for _, cached in first] == [False, True, False, True]


def test_after_new_weights_tokens_that_were_drawn_keep_the_experts_that_drew_them(mixtral: Any) -> None:
    def body(engine: Engine) -> list[RolloutResult]:
        engine.add(PROMPTS[2], replace(SAMPLING, n=1, max_new_tokens=8))
        engine.add(PROMPTS[0], replace(SAMPLING, n=1, max_new_tokens=1))
        outputs = engine.step()  # one has its first token; of the other's prompt a part was run
        for weight in engine._runner._model.model.layers[0].mlp.gate.parameters():
            weight.data = weight.flip(0).contiguous()  # the experts change numbers
        engine.weights_changed()
        engine.run_until(lambda more: bool(outputs.extend(more)) or sum(o.result is not None for o in outputs) == 2)
        return [output.result for output in outputs if output.result is not None]

    [results] = on_ranks(mixtral, TP1, body, **CONFIG, max_num_batched_tokens=64)
    by_length = sorted(results, key=lambda r: len(r.prompt_token_ids))
    old = experts_of(mixtral, [*PROMPTS[2], *by_length[0].token_ids][:-1])
    experts = by_length[0].routed_experts
    assert experts is not None and experts.shape == old.shape
    assert np.array_equal(experts[:40], old[:40]) and not np.array_equal(experts[40:, 0], old[40:, 0])
    late = by_length[1].routed_experts
    assert late is not None and (late[:, 0] == 3 - experts_of(mixtral, PROMPTS[0])[:, 0]).mean() > 0.99


def test_an_aborted_request_has_the_experts_of_what_was_run(mixtral: Any) -> None:
    def body(engine: Engine) -> list[RolloutResult]:
        name = engine.add(PROMPTS[0], replace(SAMPLING, n=1))
        engine.step()
        engine.abort(name)
        other = engine.add(PROMPTS[2], replace(SAMPLING, n=1))
        engine.abort(other)
        outputs = engine.step()
        return [output.result for output in outputs if output.result is not None]

    [(begun, waiting)] = on_ranks(mixtral, TP1, body, **CONFIG, max_num_batched_tokens=64)
    assert begun.routed_experts is not None and waiting.routed_experts is not None
    assert np.array_equal(begun.routed_experts, experts_of(mixtral, PROMPTS[0])[:64])
    assert len(waiting.routed_experts) == 0


def test_where_nobody_asks_there_is_no_hook_and_no_byte_and_else_one_gather_in_each_step(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, gather = replace(SAMPLING, routed_experts=False), ThreadComm.all_gather
    sent: list[tuple[torch.dtype, int]] = []

    def counted(self: ThreadComm, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self.index == 0:
            sent.append((x.dtype, x.nbytes))
        return gather(self, x, out)

    monkeypatch.setattr(ThreadComm, "all_gather", counted)
    generate(mixtral, PCP2)
    asked = list(sent)
    sent.clear()
    with monkeypatch.context() as patched:
        patched.setattr("cpinfer.models.routed_experts.ExpertLayers.watched", None)
        assert all(r.routed_experts is None for r in generate(mixtral, PCP2, plain))
    of_experts = [num_bytes for dtype, num_bytes in asked if dtype == torch.uint8]
    assert [x for x in asked if x[0] != torch.uint8] == sent, "what else travels is the same"
    # A prefill, of which a rank has half of each prompt; then 6 samples on 2 ranks.
    assert of_experts == [(125 + 3 + 20) * 2 * 2 * 2, *[3 * 2 * 2 * 2] * 5]


def test_models_without_experts_and_experts_that_cannot_be_seen_are_refused_by_name(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(cpinfer.UserError, match=r'"routed_experts" asks .* "qwen2" has none'):
        generate(make_model(FAMILIES["qwen2"]), TP1)
    monkeypatch.setattr(type(mixtral.model.layers[0].mlp.experts), "forward", lambda self, rows: rows)
    with pytest.raises(cpinfer.UnsupportedError, match=r"layer 0 with experts in a MixtralExperts: .*routed_experts"):
        generate(mixtral, TP1)
