"""Copies of rows from place to place: new K and V into send buffers, and from there into the cache.

On CUDA K and V are one Triton kernel, which reads and writes each value once, where Triton is installed; what is
written here in torch is its definition, and what runs elsewhere.

Letters: N rows, K KV heads, D dim of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cpinfer.ops.float8 import movable, put_rows, take_rows
from cpinfer.ops.triton_modules import triton_module

# From where, to where.
Copy = tuple[Tensor, Tensor]


def copy_rows(copies: Sequence[Copy], src_rows: Tensor | None, dst_rows: Tensor | None) -> None:
    """For each (src, dst) of `copies`, `[*, K, D]` each: `dst[dst_rows] = src[src_rows]`.

    `src_rows`, `dst_rows` `[N]` int64, the latter distinct; None is the first N, of all of src where both are. The
    copies agree in their rows and heads, D and strides are their own; values are cast where dtypes differ.
    """
    kernels = _kernels_for(copies)
    if kernels is not None:
        kernels.copy_rows([(movable(src), movable(dst)) for src, dst in copies], src_rows, dst_rows)
        return
    for src, dst in copies:
        rows = src if src_rows is None else take_rows(src, src_rows)
        if dst_rows is None:
            dst[: len(rows)] = rows
        else:
            put_rows(dst, dst_rows, rows)


def _kernels_for(copies: Sequence[Copy]) -> Any:
    """The kernel, for one or two copies on CUDA whose values lie side by side and keep their dtype; else None."""
    if not copies or not copies[0][0].is_cuda:  # in every layer and step on CPU
        return None
    fits = len(copies) <= 2 and all(
        src.dtype == dst.dtype and src.stride(-1) == dst.stride(-1) == 1 for src, dst in copies
    )
    return triton_module("copy_kernels") if fits else None
