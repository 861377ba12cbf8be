"""Copying rows of K and V in one launch: a Triton kernel of what `row_copies` says in torch.

Imported on first use, and only where Triton is; under its interpreter (`TRITON_INTERPRET=1`) it runs on CPU.

Letters: N rows, K KV heads, D dim of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


def copy_rows(copies: Sequence[tuple[Tensor, Tensor]], src_rows: Tensor | None, dst_rows: Tensor | None) -> None:
    """`dst[dst_rows] = src[src_rows]` for one or two (src, dst) `[*, K, D]`, of one dtype, last dim contiguous."""
    first, second = copies[0], copies[-1]
    rows = dst_rows if src_rows is None else src_rows
    num_rows = len(first[0]) if rows is None else len(rows)
    if num_rows == 0:
        return
    num_heads, dims = first[0].shape[1], [src.shape[2] for src, _ in (first, second)]
    _copy[(num_rows,)](
        *first,
        *second,
        first[0] if src_rows is None else src_rows,  # never read where there is none
        first[0] if dst_rows is None else dst_rows,
        *(x.stride(dim) for x in (*first, *second) for dim in (0, 1)),
        num_heads,
        *dims,
        HAS_SECOND=len(copies) > 1,
        HAS_SRC_ROWS=src_rows is not None,
        HAS_DST_ROWS=dst_rows is not None,
        BLOCK_K=triton.next_power_of_2(num_heads),
        BLOCK_D=triton.next_power_of_2(max(dims)),
        num_warps=4,
    )


# One program is one row: all heads of both copies.


@triton.jit
def _copy(
    src_a,
    dst_a,
    src_b,
    dst_b,
    src_rows,
    dst_rows,
    src_a_n,
    src_a_k,
    dst_a_n,
    dst_a_k,
    src_b_n,
    src_b_k,
    dst_b_n,
    dst_b_k,
    K,
    D_a,
    D_b,
    HAS_SECOND: tl.constexpr,
    HAS_SRC_ROWS: tl.constexpr,
    HAS_DST_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    src_row = tl.load(src_rows + n) if HAS_SRC_ROWS else n
    dst_row = tl.load(dst_rows + n) if HAS_DST_ROWS else n
    k, d = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_D)[None, :]
    seen = (k < K) & (d < D_a)
    values = tl.load(src_a + src_row * src_a_n + k * src_a_k + d, mask=seen)
    tl.store(dst_a + dst_row * dst_a_n + k * dst_a_k + d, values, mask=seen)
    if HAS_SECOND:
        seen = (k < K) & (d < D_b)
        values = tl.load(src_b + src_row * src_b_n + k * src_b_k + d, mask=seen)
        tl.store(dst_b + dst_row * dst_b_n + k * dst_b_k + d, values, mask=seen)
