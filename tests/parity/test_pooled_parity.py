"""Prompts of many ranks generated together: every rank gets what one process would have given it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from test_engine_parity import grid_name

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import Prompt, RolloutResult
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=6, seed=5)
A, B, C = [1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12]
# A group of A that spans ranks, a rank that asks for nothing, a prompt of one token.
OWN = [[A, A, B], [], [A, C, C], [B]]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(FAMILIES["qwen2"])


def pooled(grid: RankGrid, own: list[list[list[int]]], **options: Any) -> list[list[RolloutResult]]:
    config = parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            "kv_cache_gib": 2**-7,
        }
    )
    # Each rank attaches to a model of its own, of the same weights.
    models = [make_model(FAMILIES["qwen2"]) for _ in range(grid.world_size)]

    def body(topology: cpinfer.Topology) -> tuple[list[RolloutResult], int]:
        with cpinfer.attach(models[topology.rank], topology, config) as engine:
            results = engine.generate_pooled(own[topology.rank], SAMPLING, name="step/3", **options)
            return results, engine.stats.num_computed_prefill_tokens

    return run_ranks(grid, body)


def one_process(model: Any) -> dict[tuple[tuple[int, ...], int], RolloutResult]:
    """All samples of the distinct prompts, by prompt and sample."""
    prompts = [Prompt(i, f"step/3/0/{i}", tuple(tokens)) for i, tokens in enumerate((A, B, C))]
    each = [dataclasses.replace(SAMPLING, n=n) for n in (3, 2, 2)]
    with cpinfer.attach(model, config=parse_config({"dtype": "float32"})) as engine:
        return {(r.prompt_token_ids, r.sample_index): r for r in engine.generate(prompts, each)}


@pytest.mark.parametrize("grid", [RankGrid(pcp_size=4, dcp_size=4), RankGrid(pcp_size=4, dcp_size=1)], ids=grid_name)
def test_each_rank_gets_its_own_samples_as_one_process_would_draw_them(model: Any, grid: RankGrid) -> None:
    whole = one_process(model)
    ranks = pooled(grid, OWN)
    wanted = [[(A, 0), (A, 1), (B, 0)], [], [(A, 2), (C, 0), (C, 1)], [(B, 1)]]
    for (results, _), keys in zip(ranks, wanted, strict=True):
        assert [r.token_ids for r in results] == [whole[tuple(p), n].token_ids for p, n in keys]
    drawn = [whole[tuple(A), n].token_ids for n in range(3)]
    assert len(set(drawn)) == 3  # the control: samples of one group differ


def test_a_group_that_spans_ranks_prefills_its_prompt_once() -> None:
    ranks = pooled(RankGrid(pcp_size=4, dcp_size=4), OWN)
    assert {num for _, num in ranks} == {len(A) + len(B) + len(C)}


def test_replicas_draw_other_random_numbers_for_the_same_prompt() -> None:
    (first, _), (second, _) = pooled(RankGrid(dp_size=2), [[A], [A]])
    assert first[0].token_ids != second[0].token_ids


def test_ranks_that_train_on_the_same_data_get_the_same_samples() -> None:
    ranks = pooled(RankGrid(pcp_size=4, dcp_size=4), [[A, B], [A, B], [A], [A]], num_copies=2)
    tokens = [[r.token_ids for r in results] for results, _ in ranks]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3]
    assert tokens[0][0] != tokens[2][0]
