"""Layouts of several ranks, as threads, through prefill, context, decode and the exchanges, on FlashInfer's kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from attention_cases import BF16, Heads, backend_of

from cpinfer.layout.advice import legal_layouts
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import Exchange
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.gpu.attention_ranks import Case, Tampering, run_case
from interpreted_cuda.tensors import CUDA, triton_on_host

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter was not chosen"),
]

NUM_Q_HEADS = 8
LENGTHS = (1, 17, 65)
TOLERANCE = 5e-2  # of an output of size 1, whose states are rounded to bf16 before they are merged
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
    case = Case(
        grid,
        NUM_Q_HEADS,
        num_kv_heads,
        LENGTHS,
        block_size=16,
        head_dim=128,
        num_new_tokens=2,
        chunk=chunk,
        context_exchange=exchange,
        dtype=BF16,
        device=CUDA,
    )
    tampering = Tampering(backend=lambda _: backend_of(Heads(NUM_Q_HEADS, KVLayout(num_kv_heads, 128, 128))))
    assert run_case(case, tampering).max_error <= TOLERANCE
