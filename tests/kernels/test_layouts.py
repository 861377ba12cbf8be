"""Layouts of several ranks, as threads, through prefill, context, decode and the exchanges, on FlashInfer's kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import BF16, Heads, backend_of

from cpinfer.layout.advice import legal_layouts
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import Exchange
from cpinfer.layout.grid import RankGrid
from cpinfer.models.spec import LatentDims
from cpinfer_tools.gpu.attention_ranks import Case, Tampering, run_case
from interpreted_cuda.tensors import CUDA, triton_on_host

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter was not chosen"),
]

NUM_Q_HEADS = 8
LENGTHS = (1, 17, 65)
TOLERANCE = 5e-2  # of an output of size 1, whose states are rounded to bf16 before they are merged
BY_FLASHINFER = Tampering(backend=lambda _: backend_of(Heads(NUM_Q_HEADS, KVLayout(1, 128, 128))))
MODES: tuple[tuple[int | None, Exchange], ...] = ((None, "queries"), (32, "queries"), (32, "kv"))


def layouts() -> Iterator[tuple[RankGrid, int, int | None, Exchange]]:
    """Every legal layout of up to 4 ranks, and those of 8 that spread one sequence wide; the modes take turns."""
    turn = 0
    for num_ranks in (1, 2, 4, 8):
        for num_kv_heads in (1, 2, 8):
            for option in legal_layouts(num_ranks, NUM_Q_HEADS, num_kv_heads, dp_size=1):
                if num_ranks < 8 or option.grid.dcp_size >= 4:
                    yield option.grid, num_kv_heads, *MODES[turn % len(MODES)]
                    turn += 1


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with triton_on_host():
        yield


@pytest.mark.parametrize(("grid", "num_kv_heads", "chunk", "exchange"), list(layouts()), ids=str)
def test_ranks_together_equal_dense_attention(
    grid: RankGrid, num_kv_heads: int, chunk: int | None, exchange: Exchange
) -> None:
    case = case_of(grid, num_kv_heads, head_dim=128, chunk=chunk, context_exchange=exchange)
    assert run_case(case, BY_FLASHINFER).max_error <= TOLERANCE


# Widened or not, over columns, pcp ranks and both, and in homes.
GRIDS = [
    RankGrid(1, 1, 1),
    RankGrid(1, 2, 2),
    RankGrid(2, 1, 2),
    RankGrid(2, 2, 4),
    RankGrid(1, 4, 2),
    RankGrid(4, 2, 8),
]
LATENT = LatentDims(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)


@pytest.mark.parametrize(("chunk", "exchange"), MODES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_latents_of_ranks_equal_dense_attention(grid: RankGrid, chunk: int | None, exchange: Exchange) -> None:
    case = case_of(grid, 1, latent=LATENT, chunk=chunk, context_exchange=exchange)
    # Expanded keys are rounded to bf16, which logits of this size show whoever computes them.
    by_rounding = run_case(replace(case, device=torch.device("cpu"))).max_error
    assert run_case(case, BY_FLASHINFER).max_error <= by_rounding + TOLERANCE


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_under_a_soft_cap_of_ranks_equal_dense_attention(grid: RankGrid, chunk: int | None) -> None:
    num_kv_heads = 1 if grid.dcp_size > grid.pcp_size else 2
    case = case_of(grid, num_kv_heads, head_dim=64, window=24, soft_cap=20.0, chunk=chunk)
    assert run_case(case, BY_FLASHINFER).max_error <= TOLERANCE


@pytest.mark.parametrize("changes", [{"latent": LATENT}, {"head_dim": 64, "window": 24, "soft_cap": 20.0}], ids=str)
def test_the_keys_of_a_wrong_shard_are_seen(changes: dict[str, Any]) -> None:
    """The control."""
    wrong = replace(BY_FLASHINFER, shard=lambda topology: 0)
    assert run_case(case_of(RankGrid(1, 2, 2), 1, **changes), wrong).max_error > 4 * TOLERANCE


def case_of(grid: RankGrid, num_kv_heads: int, **changes: Any) -> Case:
    case = Case(grid, NUM_Q_HEADS, num_kv_heads, LENGTHS, block_size=16, num_new_tokens=2, dtype=BF16, device=CUDA)
    return replace(case, **changes)
