"""Attention on CPU by a kernel of our own: all rows of a step in one call, read through their block tables.

It takes rows of few queries, as decode has them, of which torch's kernel needs a call each and a copy of what is
scattered; and all that torch's kernel has no path of its own for: windows, soft caps, keys in fp8. Rows of many queries
are products of matrices, which are torch's where its library has the faster ones.

The kernel is `ops/ordered_attention.py`, over one virtual shard. It is compiled when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds, PlannedAttention
from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.cpu_kernels.compiling import compiled
from cpinfer.ops.ordered_attention import OrderedAttention
from cpinfer.ops.states import State
from cpinfer.refusals import refuse

# Rows of more queries than this are torch's where its products are the faster ones. On an Intel Xeon with AMX a prompt
# of 16,384 tokens took the kernel 3.3 times as long in bfloat16, and 1.4 times in float32 (before it held rows in
# registers). On an AMD EPYC with AVX-512 it takes 1.1 to 2.1 times less than torch's, from 64 to 2,048 queries and 300
# to 16,384 keys.
MAX_QUERIES_WHERE_TORCH_MULTIPLIES_FASTER = 64

# Keys per query that a shared prefix has to save: its rows are then read once, and merged with the others. Measured by
# `tools/bench/cascade.py`: a step of groups of eight is 1.01 times as fast where 448 are saved, 0.96 times where 224.
MIN_SAVED_KEYS = 384


def unfit(device: torch.device, needs: AttentionNeeds) -> UserError | None:
    """Why not here: another device, a dtype that it does not sum in, or a kernel that cannot be compiled."""
    if device.type != "cpu":
        return refuse("cpu_backend_device", f"device {device}")
    if needs.dtype == torch.float64:
        return refuse("cpu_backend_dtype", f"dtype {needs.dtype}")
    try:
        compiled("ordered_attention")
    except UserError as error:
        return error
    return None


def device_bytes(device: torch.device, needs: AttentionNeeds) -> int:
    """Nothing that lasts longer than a call."""
    return 0


def make(device: torch.device, needs: AttentionNeeds) -> CpuBackend:
    """It is ours, and tests hold it to the definition of attention."""
    return CpuBackend(MAX_QUERIES_WHERE_TORCH_MULTIPLIES_FASTER if _torch_multiplies_faster() else None)


def _torch_multiplies_faster() -> bool:
    """Whether torch's products of large matrices are faster here than loops that a compiler makes."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to older torch
    return "AMD" not in str(capabilities.get("cpu_name", ""))


class CpuBackend:
    """Plans hold no state, so any number of them are valid at once.

    A row of more than `max_queries` is torch's, where that has a kernel for it as well; with None all rows are the
    kernel's.
    """

    name = "cpu"
    min_saved_keys: int | None = MIN_SAVED_KEYS

    def __init__(self, max_queries: int | None) -> None:
        self._max_queries = max_queries
        self._torch = TorchBackend(torch.device("cpu"))

    def plan(self, rows: AttentionRows) -> PlannedAttention:
        whole = _Kernel(rows)
        is_long = rows.q_lens > (self._max_queries or np.inf)
        if rows.window is not None or not is_long.any():
            return whole
        by_torch = self._torch.plan(_without(rows, ~is_long))
        by_kernel = None if is_long.all() else _Kernel(_without(rows, is_long))
        short_queries = torch.from_numpy(np.flatnonzero(np.repeat(~is_long, rows.q_lens)))
        return _Parts(whole, by_torch, by_kernel, short_queries)


class _Kernel:
    """All rows by the kernel."""

    def __init__(self, rows: AttentionRows) -> None:
        self._planned = OrderedAttention(rows, num_shards=1, interleave=rows.block_size)

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        out, lse = self._planned.run(q, keys, values, scale=scale, soft_cap=soft_cap)
        return out.to(q.dtype), lse


class _Parts:
    """Rows of many queries by torch and those of `short_queries` by the kernel, or all by the kernel."""

    def __init__(
        self, whole: PlannedAttention, by_torch: PlannedAttention, by_kernel: PlannedAttention | None, short: Tensor
    ) -> None:
        self._whole = whole
        self._by_torch = by_torch
        self._by_kernel = by_kernel
        self._short_queries = short

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        if soft_cap is not None or keys.dtype != q.dtype:
            return self._whole.run(q, keys, values, scale=scale, soft_cap=soft_cap)
        out, lse = self._by_torch.run(q, keys, values, scale=scale)
        if self._by_kernel is not None:
            short_out, short_lse = self._by_kernel.run(q, keys, values, scale=scale)
            out[self._short_queries] = short_out[self._short_queries]
            lse[self._short_queries] = short_lse[self._short_queries]
        return out, lse


def _without(rows: AttentionRows, dropped: NDArray[np.bool_]) -> AttentionRows:
    """The same rows, of which those that are `dropped` see nothing."""
    kv_lo, kv_hi = (np.where(dropped, 0, ends).astype(np.int32) for ends in (rows.kv_lo, rows.kv_hi))
    return replace(rows, kv_lo=kv_lo, kv_hi=kv_hi)
