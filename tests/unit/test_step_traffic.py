"""Bytes on the wire: what is predicted of whole steps is what the engine's collectives are counted to move."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest

import cpinfer
from cpinfer.comm.axis import CountingComm, Traffic
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.step_traffic import Moved, PrefillWork, Widths, decode_moved, prefill_moved
from cpinfer.models.model_sizes import model_sizes
from tiny_models import FAMILIES, make_model, prompts_of

FLOAT32 = Widths(4, 4, 4)
BLOCK_SIZE = 4
COUNTED = ("num_all_gather", "num_all_to_all", "received_bytes")
# Homes of two ranks, and one home of all; the others are slow.
GRIDS = [
    RankGrid(pcp_size=4, dcp_size=2),
    RankGrid(pcp_size=2, dcp_size=2),
    *(pytest.param(RankGrid(1, pcp, dcp), marks=pytest.mark.slow) for pcp, dcp in ((2, 1), (3, 3), (4, 4))),
]


def counted(model: Any, grid: RankGrid, prompts: list[list[int]], num_new: int, step_tokens: int) -> dict[str, Traffic]:
    """What each axis of rank 0 moved while `num_new` tokens behind each prompt were made, call and admission aside."""

    def body(topology: cpinfer.Topology) -> dict[str, Traffic]:
        axes = {axis: CountingComm(getattr(topology, axis)) for axis in ("pcp", "dcp", "replica")}
        config = parse_config(
            {
                "dtype": "float32",
                "prefill_context_parallel_size": grid.pcp_size,
                "decode_context_parallel_size": grid.dcp_size,
                "kv_cache_gib": 2**-7,
                "block_size": BLOCK_SIZE,
                "max_num_batched_tokens": step_tokens,
                "context_workspace_tokens": step_tokens,
                "enable_prefix_caching": False,
            }
        )
        with cpinfer.attach(copy.deepcopy(model), dataclasses.replace(topology, **axes), config) as engine:
            params = SamplingParams(temperature=0, max_new_tokens=num_new, ignore_eos=True)
            for counting in axes.values():
                counting.traffic = Traffic()
            engine.generate(prompts, params)
            return {axis: counting.traffic for axis, counting in axes.items()}

    return run_ranks(grid, body)[0]


def totals(moved: list[Moved]) -> dict[str, tuple[int, int, int]]:
    """Per axis: gathers, all-to-alls, bytes."""
    found: dict[str, Counter[str]] = {}
    for each in moved:
        on_axis = found.setdefault(each.axis, Counter())
        on_axis[each.kind] += each.num
        on_axis["bytes"] += each.received_bytes
    return {axis: (on["gather"], on["all_to_all"], on["bytes"]) for axis, on in found.items()}


def difference(more: dict[str, Traffic], less: dict[str, Traffic]) -> dict[str, tuple[int, ...]]:
    """What one call moved beyond another that began alike."""
    pairs = {axis: [[getattr(t[axis], name) for name in COUNTED] for t in (more, less)] for axis in more}
    return {axis: tuple(a - b for a, b in zip(*both, strict=True)) for axis, both in pairs.items()}


def without_idle_axes(moved: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {axis: numbers for axis, numbers in moved.items() if any(numbers)}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_bytes_of_decode_steps_are_those_that_are_counted(family: str, grid: RankGrid) -> None:
    model = make_model(FAMILIES[family])
    prompts = prompts_of([9] * 5, vocab_size=128)
    steps = difference(*(counted(model, grid, prompts, n, 512) for n in (6, 3)))  # three decode steps more
    rows = -(-(5 // grid.num_homes + 5 % grid.num_homes) // grid.row_ranks)
    predicted = totals([each for _ in range(3) for each in decode_moved(sizes_of(model), grid, rows, FLOAT32)])
    assert without_idle_axes(steps) == predicted


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "family", ["gemma2", "deepseek_v3", "qwen3_next", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def test_bytes_of_prefill_steps_are_those_that_are_counted(family: str, grid: RankGrid) -> None:
    """Of a prompt in three steps: what the last two move beyond those of a prompt of one step."""
    model, chunk = make_model(FAMILIES[family]), 96
    long, short = prompts_of([3 * chunk, chunk], vocab_size=128)
    steps = difference(*(counted(model, grid, [prompt], 1, chunk) for prompt in (long, short)))
    sharding = KVSharding(grid.dcp_size, BLOCK_SIZE, BLOCK_SIZE)
    sizes, spec = sizes_of(model), model_spec(model)
    predicted: list[Moved] = []
    for i, sign in ((0, 1), (1, 1), (2, 1), (0, -1)):
        ends = [i == 2 or sign < 0]
        work = PrefillWork.of([chunk], [i * chunk], grid.pcp_size, ends, pairs_per_token=spec.pairs_per_token)
        for each in prefill_moved(sizes, grid, work, FLOAT32, sharding, workspace_tokens=chunk):
            predicted.append(Moved(each.axis, each.kind, sign * each.num, sign * each.received_bytes))
    assert without_idle_axes(steps) == without_idle_axes(totals(predicted))


def sizes_of(model: Any) -> Any:
    return model_sizes(model_spec(model), model)
