"""Products and sums of rows whose order nothing changes: Triton kernels, for CUDA, of fixed tiles.

A product is made of tiles of the same shape for any number of rows, each summed over K from front to back by one
program; K is never split, and nothing is tuned by the number of rows. So the bits of a row depend on that row alone,
wherever in a tile it stands. A compiler, too, could choose another order, for it makes a kernel anew for numbers that
16 divides, and for addresses: so it is told nothing of the number of rows, and all that it is given lies aligned.

Imported on first use, and only where Triton is; under its interpreter (`TRITON_INTERPRET=1`) it runs on CPU.

Letters: M rows, N outputs, K inputs of a weight `[N, K]`, E weights, R rows that are summed, D numbers in them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes, of which Triton asks of an address
BLOCK_M = 64
# Outputs and inputs of a tile, by the bytes of a number.
BLOCKS_N_K = {4: (64, 32), 2: (128, 64)}
# Numbers of a row that are summed together, and all that a program sums together.
MAX_BLOCK_D, BLOCK_NUMBERS = 1024, 4096
# Programs that take tiles in turns, for each multiprocessor of a GPU.
PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED_PROGRAMS = 3


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`[M, N]` of rows `[M, K]` with a weight `[N, K]` of any strides, in their dtype, summed in float32."""
    M, K = rows.shape
    out = rows.new_empty(M, len(weight))
    rows = aligned(rows)
    _run(rows, weight.unsqueeze(0), out, None, (0, K), (0, len(weight)))
    return out


def products(rows: Tensor, weights: Tensor) -> Tensor:
    """`[M, E, N]` of rows `[M, E, K]`, for each e with its own weight of `weights [E, N, K]`."""
    M, E, K = rows.shape
    N = weights.shape[1]
    out = rows.new_empty(M, E, N)
    _run(aligned(rows), weights, out, None, (K, E * K), (N, E * N))
    return out


def grouped_products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`[M, N]` of rows `[M, K]`: those before `ends[e]`, int32, and past e - 1's with weight e of `[E, N, K]`.

    Rows behind the last end get zeros.
    """
    (M, K), N = rows.shape, weights.shape[1]
    out = rows.new_zeros(M, N)
    _run(aligned(rows), weights, out, ends, (0, K), (0, N))
    return out


def sums(rows: Tensor) -> Tensor:
    """`[R]`, float32, of rows `[R, D]`."""
    R, D = rows.shape
    out = rows.new_empty(R, dtype=torch.float32)
    if R:
        block_r, block_d = _blocks_of(D)
        _sums[(triton.cdiv(R, block_r),)](aligned(rows), out, R, D, ROWS=block_r, BLOCK=block_d, num_warps=4)
    return out


def cumulative_sums(rows: Tensor) -> Tensor:
    """`[R, D]`, float32, of rows `[R, D]`."""
    R, D = rows.shape
    out = rows.new_empty(R, D, dtype=torch.float32)
    if out.numel():
        block_r, block_d = _blocks_of(D)
        _cumulative_sums[(triton.cdiv(R, block_r),)](aligned(rows), out, R, D, ROWS=block_r, BLOCK=block_d, num_warps=4)
    return out


def aligned(x: Tensor) -> Tensor:
    """x, contiguous, at an address as Triton likes it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _run(
    rows: Tensor,
    weights: Tensor,
    out: Tensor,
    ends: Tensor | None,
    row_strides: tuple[int, int],
    out_strides: tuple[int, int],
) -> None:
    """Strides are from weight to weight and from row to row: said, since those of a single row may be any."""
    E, N, K = weights.shape
    M = len(rows)
    if out.numel() == 0:
        return
    if weights.data_ptr() % ALIGNMENT:  # as a slice of a buffer may lie
        weights = weights.clone()
    block_n, block_k = BLOCKS_N_K[rows.dtype.itemsize]
    num_tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, block_n)
    _products[(min(num_tiles, _num_programs(rows.device)), E)](
        rows,
        weights,
        out,
        rows if ends is None else ends,  # never read where there are none
        M,
        N,
        K,
        *row_strides,
        *weights.stride(),
        *out_strides,
        HAS_ENDS=ends is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _blocks_of(D: int) -> tuple[int, int]:
    """Rows that a program sums, and how many of their numbers at once."""
    block = min(MAX_BLOCK_D, max(16, triton.next_power_of_2(D)))
    return BLOCK_NUMBERS // block, block


# Programs (p, e) take the tiles p, p + P, p + 2 P, ... of what weight e is to multiply.


@triton.jit(do_not_specialize=["M"])
def _products(
    x,
    w,
    out,
    ends,
    M,
    N,
    K,
    x_e,
    x_m,
    w_e,
    w_n,
    w_k,
    out_e,
    out_m,
    HAS_ENDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    first, last = M * 0, M
    if HAS_ENDS:
        first = tl.load(ends + e - 1, mask=e > 0, other=0)
        last = tl.load(ends + e)
    tiles_m, tiles_n = tl.cdiv(last - first, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Rows of eight tiles, one column of tiles after another: those that run together read the same memory.
        first_m = tile // (8 * tiles_n) * 8
        num_m = tl.minimum(tiles_m - first_m, 8)
        in_band = tile % (8 * tiles_n)
        m = first + (first_m + in_band % num_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = in_band // num_m * BLOCK_N + tl.arange(0, BLOCK_N)
        m_64, n_64 = m.to(tl.int64), n.to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            rows = tl.load(
                x + e * x_e + m_64[:, None] * x_m + k[None, :],
                mask=(m[:, None] < last) & (k[None, :] < K),
                other=0.0,
            )
            columns = tl.load(
                w + e * w_e + n_64[None, :] * w_n + k[:, None].to(tl.int64) * w_k,
                mask=(n[None, :] < N) & (k[:, None] < K),
                other=0.0,
            )
            acc = tl.dot(rows, columns, acc, input_precision="ieee")
        tl.store(
            out + e * out_e + m_64[:, None] * out_m + n[None, :],
            acc.to(out.dtype.element_ty),
            mask=(m[:, None] < last) & (n[None, :] < N),
        )


# One program is some rows, as many as their width leaves room for.


@triton.jit(do_not_specialize=["R"])
def _sums(x, out, R, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        seen = (row < R)[:, None] & (d < D)[None, :]
        acc += tl.load(x + row[:, None] * D + d[None, :], mask=seen, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(acc, axis=1), mask=row < R)


@triton.jit(do_not_specialize=["R"])
def _cumulative_sums(x, out, R, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    before = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at, seen = row[:, None] * D + d[None, :], (row < R)[:, None] & (d < D)[None, :]
        numbers = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
        until = before[:, None] + tl.cumsum(numbers, axis=1)
        tl.store(out + at, until, mask=seen)
        before = tl.sum(tl.where((tl.arange(0, BLOCK) == BLOCK - 1)[None, :], until, 0.0), axis=1)
