"""Attention whose bits are a function of each query and of the keys it sees: the same whatever is computed beside it.

The keys of a sequence are dealt to *virtual shards*, `interleave` at a time, as they are to the shards that hold them,
of which each holds the same number of virtual ones. A query's state over a virtual shard is computed tile by tile, and
its states merge in the order of virtual shards. Which rank computes a state, beside which queries and in which step,
changes nothing. On CPU in C++ (`cpu_kernels/ordered_attention.cpp`), compiled when first asked for, all of it in
float32; on CUDA in Triton (`ordered_kernels.py`). The two agree up to rounding, each with itself in every bit.

Letters: T queries, H query heads, K KV heads, D head dim, V head dim of values, S virtual shards.
"""

from __future__ import annotations

import ctypes
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows, ends_of
from cpinfer.ops.cpu_kernels.compiling import compiled
from cpinfer.ops.states import State
from cpinfer.ops.triton_modules import triton_module

# Queries, times the heads that share a KV head, for which keys are laid out once: with fewer it is done more often,
# with more there is less to share among threads. Of 2,048 queries over 16,384 keys, 1,024 took 0.91 of the time of 256.
MAX_ROWS_PER_UNIT, MIN_ROWS_PER_UNIT = 1024, 256
_STORED_IN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 3}


class _Call(ctypes.Structure):
    """`Call` of the C++ file, field by field."""

    _fields_ = [
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_indptr", "kv_lo", "kv_hi", "block_indptr", "block_ids", "begins")),
        *((name, ctypes.c_int64) for name in ("block_size", "causal", "window", "num_shards", "interleave")),
        *((name, ctypes.c_int64) for name in ("num_q_heads", "num_kv_heads", "dim", "v_dim")),
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "meanings")),
        *((name, ctypes.c_int64) for name in ("stored_in", "q_row", "q_head", "k_slot", "k_head", "v_slot", "v_head")),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("is_merged", "queries_per_unit", "num_threads")),
    ]


class OrderedAttention:
    """Attention over the rows of one plan, whose keys are dealt to `num_shards` virtual shards."""

    def __init__(self, rows: AttentionRows, num_shards: int, interleave: int) -> None:
        self._rows = rows
        self._num_shards = num_shards
        self._interleave = interleave
        self._q_indptr = ends_of(rows.q_lens)
        self._begins = np.ascontiguousarray(rows.places_of_tables, dtype=np.int64)
        self._placed: dict[object, Any] = {}  # by device and what decides the sizes of programs

    def states(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        """`out [T, H, S, V]`, `lse [T, H, S]`, float32: a state for each virtual shard; without keys `(0, -inf)`.

        q `[T, H, D]`, keys `[slots, K, D]`, values `[slots, K, V]`, last dim contiguous, otherwise of any strides.
        """
        kernels = _kernels_for(q)
        if kernels is not None:
            state: State = kernels.states(*self._launch(kernels, q, keys, values, scale, soft_cap))
            return state
        T, H, _ = q.shape
        S, V = self._num_shards, values.shape[-1]
        state = q.new_empty(T, H, S, V, dtype=torch.float32), q.new_empty(T, H, S, dtype=torch.float32)
        self._run(q, keys, values, scale, soft_cap, state, is_merged=False)
        return state

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        """`out [T, H, V]`, `lse [T, H]`, float32: those states merged in order."""
        kernels = _kernels_for(q)
        if kernels is not None:
            merged: State = kernels.run(*self._launch(kernels, q, keys, values, scale, soft_cap))
            return merged
        T, H, _ = q.shape
        state = q.new_empty(T, H, values.shape[-1], dtype=torch.float32), q.new_empty(T, H, dtype=torch.float32)
        self._run(q, keys, values, scale, soft_cap, state, is_merged=True)
        return state

    def _launch(
        self, kernels: Any, q: Tensor, keys: Tensor, values: Tensor, scale: float, soft_cap: float | None
    ) -> tuple[Any, ...]:
        """What the Triton kernels are given. Rows are copied to a device once for all layers that share them."""
        self._check(q, keys, values)
        key = q.device, kernels.queries_per_unit(q, keys, values)
        if key not in self._placed:
            self._placed[key] = kernels.PlacedRows.of(self._rows, key[1], q.device)
        order = kernels.Order(self._num_shards, self._interleave, scale, soft_cap)
        return self._placed[key], q, keys, values, order

    def _check(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        if keys.dtype != values.dtype or keys.dtype not in _STORED_IN:  # which would be read beyond their ends
            raise UserError(
                f"keys are {keys.dtype} and values {values.dtype}; the kernel attends to both in one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _STORED_IN)}."
            )
        if len(q) != self._q_indptr[-1] or len(keys) != len(values):
            raise ValueError(f"{len(q)} queries, {len(keys)} keys and {len(values)} values do not fit the planned rows")

    def _run(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        soft_cap: float | None,
        state: State,
        *,
        is_merged: bool,
    ) -> None:
        self._check(q, keys, values)
        (out, lse), num_threads = state, torch.get_num_threads()
        rows_per_unit = max(MAX_ROWS_PER_UNIT // num_threads, MIN_ROWS_PER_UNIT)
        q = q.float()
        q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
        call = _Call(
            *self._planned,
            q.shape[1],
            keys.shape[1],
            q.shape[2],
            values.shape[2],
            *(x.data_ptr() for x in (q, keys, values)),
            _meanings(keys.dtype).data_ptr() if keys.dtype.itemsize == 1 else 0,
            _STORED_IN[keys.dtype],
            *q.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            scale,
            soft_cap or 0.0,
            out.data_ptr(),
            lse.data_ptr(),
            is_merged,
            max(1, rows_per_unit * keys.shape[1] // q.shape[1]),
            num_threads,
        )
        compiled("ordered_attention").cpinfer_ordered_attention(ctypes.byref(call))

    @cached_property
    def _planned(self) -> tuple[int, ...]:
        """The first fields of every call: what the plan says, and where its arrays lie, which it keeps."""
        rows = self._rows
        arrays = (self._q_indptr, rows.kv_lo, rows.kv_hi, rows.block_indptr, rows.block_ids, self._begins)
        places = (int(array.ctypes.data) for array in arrays)
        return (
            rows.num_rows,
            *places,
            rows.block_size,
            rows.causal,
            rows.window or 0,
            self._num_shards,
            self._interleave,
        )


def merge_ordered(outs: Tensor, lses: Tensor) -> State:
    """`out [..., V]`, `lse [...]` of N states, `outs [N, ..., V]`, `lses [N, ...]`, float32, merged in their order.

    As `OrderedAttention.run` merges those of virtual shards.
    """
    kernels = _kernels_for(outs)
    if kernels is not None:
        state: State = kernels.merge_in_order(outs, lses)
        return state
    outs, lses = outs.contiguous(), lses.contiguous()
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    compiled("ordered_attention").cpinfer_merge_ordered(
        *(ctypes.c_void_p(x.data_ptr()) for x in (outs, lses)),
        *(ctypes.c_int64(n) for n in (len(outs), lse.numel(), outs.shape[-1])),
        *(ctypes.c_void_p(x.data_ptr()) for x in (out, lse)),
    )
    return out, lse


def _kernels_for(x: Tensor) -> Any:
    """The kernels, where x is on CUDA and Triton is installed; else None."""
    return triton_module("ordered_kernels") if x.is_cuda else None


@cache
def _meanings(dtype: torch.dtype) -> Tensor:
    """`[256]` what each byte means."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()
