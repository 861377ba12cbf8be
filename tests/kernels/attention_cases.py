"""Rows, stores and the truth: attention cases for FlashInfer's own kernels, as layouts lead to them.

Slots that no row sees hold NaN, in keys and in values, so that reading one too many is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds, PlannedAttention
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.states import State
from interpreted_cuda.tensors import CUDA, CudaTensor, host_of

BF16, FP16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2
# Weights are rounded to the dtype before they meet the values, of std 1; logits are sums in float32.
OUT_TOLERANCE = {BF16: 2e-2, FP16: 4e-3}
LSE_TOLERANCE = 3e-3


@dataclass(frozen=True)
class Heads:
    """Query heads over a layout of keys and values, and what they come in."""

    num_q_heads: int
    layout: KVLayout
    dtype: torch.dtype = BF16
    key_dtype: torch.dtype | None = None
    soft_cap: float | None = None

    @property
    def scale(self) -> float:
        return float(self.layout.k_dim**-0.5)


@dataclass(frozen=True)
class Inputs:
    """Queries `[T, H, D]` as a model has them, heads first in memory; a store of keys and values."""

    q: Tensor
    keys: Tensor
    values: Tensor


def rows_of(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_size: int,
    *,
    causal: bool,
    seed: int = 0,
    num_blocks: int | None = None,
) -> AttentionRows:
    """Rows over scattered blocks: neighbours in a table are no neighbours in the store."""
    needed = [-(-n // block_size) for n in kv_lens]
    free = np.random.default_rng(seed).permutation(num_blocks or sum(needed) + 3).tolist()
    tables = [[free.pop() for _ in range(n)] for n in needed]
    return AttentionRows.build(list(q_lens), list(kv_lens), tables, block_size=block_size, causal=causal)


# What layouts lead to: heads and tails of prompts in one launch, chunks on context, shards without a key, long rows
# whose keys are split.
ROWS = {
    "prefill": rows_of([5, 3, 2], [5, 10, 4], 16, causal=True),
    "prefill, heads and tails": rows_of([33, 40, 7, 1], [33, 161, 90, 17], 16, causal=True),
    "prefill, heads and tails, pages of one token": rows_of([33, 40, 7, 1], [33, 161, 90, 17], 1, causal=True),
    "long prefill": rows_of([300], [387], 4, causal=True),
    "context, one row empty": rows_of([5, 3, 2, 9], [50, 33, 0, 1], 16, causal=False),
    "context, pages of one token": rows_of([70], [130], 1, causal=False),
    "long context": rows_of([300], [387], 4, causal=False),
    "context, keys split": rows_of([3, 2], [900, 411], 16, causal=False),
    "decode": rows_of([1] * 5, [7, 90, 0, 1, 33], 16, causal=False),
    "decode, pages of one token": rows_of([1] * 3, [17, 0, 40], 1, causal=False),
    "decode, keys split": rows_of([1] * 2, [900, 411], 16, causal=False),
    "only empty rows": rows_of([1, 2], [0, 0], 4, causal=False),
}
CAUSAL = tuple(name for name, rows in ROWS.items() if rows.causal)
CACHED = tuple(name for name, rows in ROWS.items() if not rows.causal)
DECODE = tuple(name for name in ROWS if name.startswith("decode"))


def seen_slots(rows: AttentionRows, num_slots: int) -> Tensor:
    """`[slots]` bool: what some row sees."""
    seen = torch.zeros(num_slots, dtype=torch.bool)
    for row in range(rows.num_rows):
        seen[torch.from_numpy(rows.slots(row))] = True
    return seen


def inputs_of(
    rows: AttentionRows, heads: Heads, *, packed: bool = True, num_slots: int | None = None, seed: int = 0
) -> Inputs:
    """On the host. `packed`: keys and values are columns of one store, as gathered ones are; else apart."""
    generator = torch.Generator().manual_seed(seed)
    layout, key_dtype = heads.layout, heads.key_dtype or heads.dtype
    blocks = int(rows.block_ids.max()) + 2 if len(rows.block_ids) else 2
    num_slots = num_slots or blocks * rows.block_size
    unseen = ~seen_slots(rows, num_slots)

    def store(width: int) -> Tensor:
        numbers = torch.randn(num_slots, layout.num_heads, width, generator=generator)
        numbers[unseen] = math.nan
        return numbers.to(key_dtype)

    q = 3 * torch.randn(heads.num_q_heads, rows.num_queries, layout.k_dim, generator=generator)
    q = q.to(heads.dtype).transpose(0, 1)
    if layout.v_is_prefix_of_k:
        keys = store(layout.k_dim)
        return Inputs(q, keys, keys[..., : layout.v_dim])
    if packed:
        both = store(layout.k_dim + layout.v_dim)
        return Inputs(q, both[..., : layout.k_dim], both[..., layout.k_dim :])
    return Inputs(q, store(layout.k_dim), store(layout.v_dim))


def on_device(inputs: Inputs) -> Inputs:
    """The same memory as CUDA tensors."""
    return Inputs(CudaTensor(inputs.q), CudaTensor(inputs.keys), CudaTensor(inputs.values))


def truth_of(rows: AttentionRows, inputs: Inputs, heads: Heads) -> State:
    """In float64, row by row, on the rounded inputs."""
    states, first = [], 0
    for row, q_len in enumerate(rows.q_lens.tolist()):
        slots = torch.from_numpy(rows.slots(row))
        part = inputs.q[first : first + q_len].double()
        # Eight-bit tensors are indexed by their bytes.
        k, v = (x.double()[slots] for x in (inputs.keys, inputs.values))
        at = {"scale": heads.scale, "causal": rows.causal, "window": rows.window, "soft_cap": heads.soft_cap}
        states.append(dense_attention(part, k, v, **at))  # type: ignore[arg-type]
        first += q_len
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def backend_of(heads: Heads) -> FlashInferBackend:
    """Over the library that is installed, unchecked: what is wrong is for the comparison to find."""
    return FlashInferBackend(CUDA, AttentionNeeds(heads.dtype, ()))


def faults(found: State, want: State, dtype: torch.dtype) -> str:
    """What differs; empty where out and lse are equal within half precision and rows without keys are (0, -inf)."""
    out, lse = (host_of(x).double() for x in found)
    empty = want[1] == -math.inf
    same_empty = bool(((lse == -math.inf) == empty).all()) and bool((out[empty] == 0).all())
    # Rows of NaN are larger than any tolerance, and no smaller than any.
    out_error = (out - want[0]).abs()
    lse_error = torch.where(empty, 0.0, lse - want[1]).abs()
    is_equal = bool((out_error <= OUT_TOLERANCE[dtype]).all()) and bool((lse_error <= LSE_TOLERANCE).all())
    if same_empty and is_equal:
        return ""
    return (
        f"out differs by {out_error.max():.3g}, lse by {lse_error.max():.3g}; rows without keys are right: {same_empty}"
    )


def check(
    rows: AttentionRows,
    heads: Heads,
    *,
    packed: bool = True,
    backend: FlashInferBackend | None = None,
    plan: PlannedAttention | None = None,
    num_slots: int | None = None,
    seed: int = 0,
) -> str:
    """Run the rows through the backend; what differs from the truth, or nothing."""
    rows = rows.over(heads.layout)
    inputs = inputs_of(rows, heads, packed=packed, num_slots=num_slots, seed=seed)
    given = on_device(inputs)
    planned = plan or (backend or backend_of(heads)).plan(rows)
    found = planned.run(given.q, given.keys, given.values, scale=heads.scale, soft_cap=heads.soft_cap)
    return faults(found, truth_of(rows, inputs, heads), heads.dtype)
