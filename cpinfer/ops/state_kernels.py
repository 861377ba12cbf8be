"""Packing and merging of attention states in one launch each: Triton kernels of what `states` says in torch.

Everything is computed in float32, states in the order given, with the same care for states of no keys. Imported on
first use, and only where Triton is; under its interpreter (`TRITON_INTERPRET=1`) it runs on CPU, where the tests are.

Letters: N states, T tokens, H query heads, D head dim, S places, C tp columns, R rows of each pcp rank, W values of a
packed row: D of out, and behind them the float32 lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpinfer.ops.states import State, packed_width

MERGED_NUMBERS = 512  # that a program merges states of


def pack_by_place(out: Tensor, lse: Tensor, wire_dtype: torch.dtype, pcp_size: int, columns: int) -> Tensor:
    """`[S, R, H, W]`: for each place its own rows and heads, from `out [pcp * R, C * H, D]`, `lse [pcp * R, C * H]`."""
    num_rows, num_heads, D = out.shape
    R, H = num_rows // pcp_size, num_heads // columns
    packed = torch.empty(columns * pcp_size, R, H, packed_width(D, wire_dtype), dtype=wire_dtype, device=out.device)
    if packed.numel():
        _pack[(num_rows * num_heads,)](
            out,
            lse,
            packed,
            packed.view(torch.float32),
            *out.stride(),
            *lse.stride(),
            num_heads,
            R,
            H,
            pcp_size,
            D,
            packed.shape[-1],
            packed.shape[-1] * wire_dtype.itemsize // 4,
            BLOCK=triton.next_power_of_2(D),
            num_warps=1,
        )
    return packed


def merge_packed(packed: Tensor, head_dim: int) -> State:
    """`out [..., D]` and `lse [...]`, float32, of N states `[N, ..., W]`, contiguous."""
    return merge_in_order(packed[..., :head_dim], packed.view(torch.float32)[..., -1])


def merge_in_order(outs: Tensor, lses: Tensor) -> State:
    """`out [..., D]` and `lse [...]`, float32, of N states, `outs [N, ..., D]`, `lses [N, ...]`, float32.

    Their bits depend on no number of rows and no strides: one binary merges N states of D values.
    """
    N, *rows, D = outs.shape
    out = torch.empty(*rows, D, dtype=torch.float32, device=outs.device)
    lse = torch.empty(*rows, dtype=torch.float32, device=outs.device)
    if lse.numel():
        outs, lses = outs.flatten(1, -2), lses.flatten(1)  # views, where rows lie evenly
        block = triton.next_power_of_2(D)
        rows_each = max(1, MERGED_NUMBERS // block)
        _merge[(triton.cdiv(lse.numel(), rows_each),)](
            outs,
            lses,
            out,
            lse,
            lse.numel(),
            *outs.stride(),
            *lses.stride(),
            D,
            N=N,
            ROWS=rows_each,
            BLOCK=block,
            num_warps=4,
        )
    return out, lse


def merge_pair(first: State, second: State, dtype: torch.dtype) -> State:
    """`out [T, H, D]` in `dtype` and `lse [T, H]` of two states, each in memory and dtype of its own."""
    T, H, D = first[0].shape
    out = torch.empty(T, H, D, dtype=dtype, device=first[0].device)
    lse = torch.empty(T, H, dtype=torch.float32, device=first[0].device)
    if lse.numel():
        strides = [stride for part, total in (first, second) for stride in (*part.stride(), *total.stride())]
        _merge_pair[(T * H,)](*first, *second, out, lse, *strides, H, D, BLOCK=triton.next_power_of_2(D), num_warps=1)
    return out, lse


# One program is one row of one head: D values, a lse.


@triton.jit
def _pack(
    out,
    lse,
    packed,
    packed_f32,
    out_t,
    out_h,
    out_d,
    lse_t,
    lse_h,
    num_heads,
    R,
    H,
    pcp_size,
    D,
    W,
    W_f32,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    t, head = at // num_heads, at % num_heads
    # Rows come pcp rank by pcp rank, heads column by column; places run pcp fastest.
    place = head // H * pcp_size + t // R
    row = (place * R + t % R) * H + head % H
    d = tl.arange(0, BLOCK)
    values = tl.load(out + t * out_t + head * out_h + d * out_d, mask=d < D)
    tl.store(packed + row * W + d, values.to(packed.dtype.element_ty), mask=d < D)
    tl.store(packed_f32 + row * W_f32 + W_f32 - 1, tl.load(lse + t * lse_t + head * lse_h))


# Here as many rows as make the numbers of a program.


@triton.jit(
    do_not_specialize=("num_rows", "out_n", "out_r", "lse_n", "lse_r"),
    do_not_specialize_on_alignment=("outs", "lses", "out", "lse"),
)
def _merge(
    outs,
    lses,
    out,
    lse,
    num_rows,
    out_n,
    out_r,
    out_d,
    lse_n,
    lse_r,
    D,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row, d = row < num_rows, tl.arange(0, BLOCK)
    of_rows = lses + row * lse_r
    peak = tl.load(of_rows, mask=is_row, other=0.0)
    for n in range(1, N):
        peak = tl.maximum(peak, tl.load(of_rows + n * lse_n, mask=is_row, other=0.0))
    # Where every state is empty, exp(-inf - -inf) would be NaN; any finite stand-in gives the right zeros.
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.exp(tl.load(of_rows, mask=is_row, other=0.0) - base)
    for n in range(1, N):
        total += tl.exp(tl.load(of_rows + n * lse_n, mask=is_row, other=0.0) - base)
    whole = tl.where(total == 0.0, 1.0, total)
    seen = is_row[:, None] & (d < D)[None, :]
    merged = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for n in range(N):
        share = tl.exp(tl.load(of_rows + n * lse_n, mask=is_row, other=0.0) - base) / whole
        part = tl.load(outs + n * out_n + row[:, None] * out_r + d[None, :] * out_d, mask=seen, other=0.0)
        merged += share[:, None] * part.to(tl.float32)
    tl.store(out + row[:, None] * D + d[None, :], merged, mask=seen)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), tl.log(whole) + base), mask=is_row)


@triton.jit
def _merge_pair(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    a_t,
    a_h,
    a_d,
    la_t,
    la_h,
    b_t,
    b_h,
    b_d,
    lb_t,
    lb_h,
    H,
    D,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    t, h = at // H, at % H
    a, b = tl.load(lse_a + t * la_t + h * la_h), tl.load(lse_b + t * lb_t + h * lb_h)
    peak = tl.maximum(a, b)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    a, b = tl.exp(a - base), tl.exp(b - base)
    total = a + b
    whole = tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, BLOCK)
    values_a = tl.load(out_a + t * a_t + h * a_h + d * a_d, mask=d < D, other=0.0).to(tl.float32)
    values_b = tl.load(out_b + t * b_t + h * b_h + d * b_d, mask=d < D, other=0.0).to(tl.float32)
    merged = a / whole * values_a + b / whole * values_b
    tl.store(out + at * D + d, merged.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + at, tl.where(total == 0.0, float("-inf"), tl.log(whole) + base))
