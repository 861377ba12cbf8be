"""Attention in the order that `ordered_attention` says: Triton kernels, for CUDA.

A program has some queries, the heads that share a KV head, and a virtual shard, whose keys it takes 64 at a time.
Products are of fixed tiles, in the dtype of the queries (float32 in full precision), summed in float32; weights of
values are rounded to that dtype, as attention kernels do. One binary runs for all plans of a model: the compiler is
told of no number that a plan or a place in memory decides, so that it cannot choose another order for it. Whole states
are those of virtual shards, merged by one kernel wherever they were computed.

Imported on first use, and only where Triton is; under its interpreter (`TRITON_INTERPRET=1`) it runs on CPU.

Letters: T queries, H query heads, K KV heads, D head dim, V head dim of values, S virtual shards, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.float8 import movable
from cpinfer.ops.row_kernels import aligned
from cpinfer.ops.state_kernels import merge_in_order
from cpinfer.ops.states import State

TILE = 64  # keys that enter a state together
MAX_BLOCK_D = 64  # numbers of a head that are multiplied together
WIDE_V = 256  # values so wide leave registers for fewer rows
BLOCK_ROWS = (64, 16)  # queries times heads in a program, below WIDE_V and from there on
# States of virtual shards take many times the memory of what is merged of them: no more than this at a time.
STATE_BYTES = 2**25


@dataclass(frozen=True)
class Order:
    """How keys are dealt, and what logits become before they are weighed. `soft_cap` None: nothing."""

    num_shards: int
    interleave: int
    scale: float
    soft_cap: float | None


@dataclass(frozen=True)
class PlacedRows:
    """The rows of a plan on a device, cut into units: u has the queries `[unit_queries[u], unit_queries[u + 1])`.

    `tables`: the row of each unit, what number in it the first query has, and the arrays of `AttentionRows`.
    """

    rows: AttentionRows
    queries_per_unit: int
    unit_queries: list[int]
    tables: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: AttentionRows, queries_per_unit: int, device: torch.device) -> PlacedRows:
        """All that the kernel reads of a plan, copied once."""
        indptr = np.concatenate([[0], np.cumsum(rows.q_lens, dtype=np.int64)])
        units = [(row, first) for row, n in enumerate(rows.q_lens.tolist()) for first in range(0, n, queries_per_unit)]
        unit_rows, unit_firsts = (
            np.array(x, dtype=np.int32) for x in (zip(*units, strict=True) if units else ((), ()))
        )
        arrays = (unit_rows, unit_firsts, indptr, rows.kv_lo, rows.kv_hi, rows.block_indptr, rows.block_ids)
        tables = (torch.from_numpy(np.ascontiguousarray(x)) for x in (*arrays, rows.places_of_tables))
        starts = [*(indptr[unit_rows] + unit_firsts).tolist(), int(indptr[-1])]
        return cls(rows, queries_per_unit, starts, tuple(table.to(device) for table in tables))

    @property
    def num_units(self) -> int:
        return len(self.unit_queries) - 1


def queries_per_unit(q: Tensor, keys: Tensor, values: Tensor) -> int:
    """How many queries, with the heads of a KV head, are a program's. By sizes of the model alone."""
    return max(1, _block_rows(values) // (q.shape[1] // keys.shape[1]))


def states(placed: PlacedRows, q: Tensor, keys: Tensor, values: Tensor, order: Order) -> State:
    """`out [T, H, S, V]`, `lse [T, H, S]`, float32: a state for each virtual shard; without keys `(0, -inf)`.

    q `[T, H, D]`, keys `[slots, K, D]`, values `[slots, K, V]`, last dim contiguous.
    """
    q, keys, values = _laid_out(q, keys, values)
    return _states_of(placed, 0, placed.num_units, q, keys, values, order)


def run(placed: PlacedRows, q: Tensor, keys: Tensor, values: Tensor, order: Order) -> State:
    """`out [T, H, V]`, `lse [T, H]`, float32: those states merged in order."""
    (T, H, _), V = q.shape, values.shape[-1]
    q, keys, values = _laid_out(q, keys, values)
    out, lse = (q.new_empty(shape, dtype=torch.float32) for shape in ((T, H, V), (T, H)))
    unit_bytes = placed.queries_per_unit * H * order.num_shards * (V + 1) * 4
    at_once = max(1, STATE_BYTES // unit_bytes)
    for first in range(0, placed.num_units, at_once):
        last = min(first + at_once, placed.num_units)
        outs, lses = _states_of(placed, first, last, q, keys, values, order)
        part = slice(placed.unit_queries[first], placed.unit_queries[last])
        out[part], lse[part] = merge_in_order(outs.movedim(2, 0), lses.movedim(2, 0))
    return out, lse


def _states_of(
    placed: PlacedRows, first: int, last: int, q: Tensor, keys: Tensor, values: Tensor, order: Order
) -> State:
    """Those of the units [first, last)."""
    (_, H, D), (K, V), S = q.shape, values.shape[1:], order.num_shards
    first_query = placed.unit_queries[first]
    T = placed.unit_queries[last] - first_query
    out, lse = (q.new_empty(shape, dtype=torch.float32) for shape in ((T, H, S, V), (T, H, S)))
    if T == 0:
        return out, lse
    rows, block_rows, group = placed.rows, _block_rows(values), H // K
    heads = min(group, block_rows)
    stored = keys.dtype
    _states[(last - first, K * triton.cdiv(group, heads), S)](
        q,
        movable(keys),
        movable(values),
        _meanings(stored, q.device) if stored.itemsize == 1 else q,  # never read where numbers are not bytes
        out,
        lse,
        *placed.tables,
        first,
        first_query,
        rows.block_size,
        int(rows.causal),
        rows.window or 0,
        order.num_shards,
        order.interleave,
        *keys.stride()[:2],
        *values.stride()[:2],
        order.scale,
        order.soft_cap or 0.0,
        heads,
        heads * placed.queries_per_unit,
        group,
        K,
        DIM=D,
        V_DIM=V,
        ROWS=block_rows,
        TILE=TILE,
        BLOCK_D=min(MAX_BLOCK_D, max(16, triton.next_power_of_2(D))),
        BLOCK_V=max(16, triton.next_power_of_2(V)),
        IS_BYTES=stored.itemsize == 1,
        HAS_CAP=order.soft_cap is not None,
        IS_ALIGNED=D % 16 == 0 and V % 16 == 0,
        num_warps=4,
        num_stages=2,
    )
    return out, lse


def _laid_out(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel wants them: q anew, since it is small, keys and values only where they do not lie as any cache."""
    dtype = q.dtype if keys.dtype.itemsize == 1 else torch.promote_types(q.dtype, keys.dtype)
    keys, values = (x if _lies_well(x) else x.contiguous().clone() for x in (keys, values))
    return aligned(q.to(dtype)), keys, values


def _lies_well(x: Tensor) -> bool:
    """Rows of a whole number of times 16 begin where such numbers do, and others anywhere."""
    is_aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:2])
    return x.stride(-1) == 1 and (is_aligned or x.shape[-1] % 16 != 0)


def _block_rows(values: Tensor) -> int:
    return BLOCK_ROWS[values.shape[-1] >= WIDE_V]


@cache
def _meanings(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[256]` what each byte means, float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)


@triton.jit
def _held(place, shard, num_shards, interleave):
    """How many of the places below `place` a virtual shard holds."""
    deal = num_shards * interleave
    rest = place % deal - shard * interleave
    return place // deal * interleave + tl.minimum(tl.maximum(rest, 0), interleave)


@triton.jit
def _numbers(at, seen, meanings, dtype: tl.constexpr, IS_BYTES: tl.constexpr):
    """What is stored, 0 where nobody sees it: there may be anything, or nothing at all."""
    stored = tl.load(at, mask=seen, other=0)
    if IS_BYTES:
        stored = tl.load(meanings + stored.to(tl.int32))
    return stored.to(dtype)


@triton.jit(
    do_not_specialize=(
        *("first_unit", "first_query", "block_size", "causal", "window", "num_shards", "interleave"),
        *("k_slot", "k_head", "v_slot", "v_head", "heads", "used_rows", "group", "num_kv_heads"),
    ),
    do_not_specialize_on_alignment=("keys", "values"),
)
def _states(
    q,
    keys,
    values,
    meanings,
    out,
    lse,
    unit_rows,
    unit_firsts,
    q_indptr,
    kv_lo,
    kv_hi,
    block_indptr,
    block_ids,
    begins,
    first_unit,
    first_query,
    block_size,
    causal,
    window,
    num_shards,
    interleave,
    k_slot,
    k_head,
    v_slot,
    v_head,
    scale,
    soft_cap,
    heads,
    used_rows,
    group,
    num_kv_heads,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_BYTES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    unit, shard = tl.program_id(0) + first_unit, tl.program_id(2)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    first_head = tl.program_id(1) // num_kv_heads * heads
    row = tl.load(unit_rows + unit)
    begin_q = tl.load(q_indptr + row)
    num_queries = tl.load(q_indptr + row + 1) - begin_q
    # Of the program's rows: the query's number in its row, and the head's in its group.
    r = tl.arange(0, ROWS)
    query, head = tl.load(unit_firsts + unit) + r // heads, first_head + r % heads
    is_row = (r < used_rows) & (query < num_queries) & (head < group)
    # Each sees the places [lo, hi) of its sequence, or of this shard of it.
    begin, range_lo, range_hi = tl.load(begins + row), tl.load(kv_lo + row), tl.load(kv_hi + row)
    at = range_hi - num_queries + query
    hi = begin + tl.where(causal != 0, at + 1, range_hi)
    lo = begin + tl.where(window != 0, tl.maximum(range_lo, at - window + 1), range_lo)
    unit_lo = tl.min(tl.where(is_row, lo, begin + range_hi), axis=0)
    unit_hi = tl.max(tl.where(is_row, hi, begin), axis=0)
    table = block_ids + tl.load(block_indptr + row)

    dtype: tl.constexpr = q.dtype.element_ty
    q_rows = q + ((begin_q + query) * group * num_kv_heads + kv_head * group + head) * DIM
    v_d = tl.arange(0, BLOCK_V)
    m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], dtype=tl.float32)
    first_tile = _held(unit_lo, shard, num_shards, interleave) // TILE
    last_tile = tl.cdiv(_held(unit_hi, shard, num_shards, interleave), TILE)
    for tile in range(first_tile.to(tl.int32), last_tile.to(tl.int32)):
        local = tl.arange(0, TILE).to(tl.int64) + tile * TILE
        place = (local // interleave * num_shards + shard) * interleave + local % interleave
        seen = (place >= unit_lo) & (place < unit_hi)
        index = place - begin
        block = tl.load(table + index // block_size, mask=seen, other=0).to(tl.int64)
        slot = block * block_size + index % block_size
        key_rows, value_rows = keys + slot * k_slot + kv_head * k_head, values + slot * v_slot + kv_head * v_head
        if IS_ALIGNED:
            key_rows, value_rows = tl.multiple_of(key_rows, [16]), tl.multiple_of(value_rows, [16])
        logits = tl.zeros([ROWS, TILE], dtype=tl.float32)
        for start in range(0, DIM, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            queries = tl.load(q_rows[:, None] + d[None, :], mask=is_row[:, None] & (d[None, :] < DIM), other=0.0)
            k_at, k_seen = key_rows[:, None] + d[None, :], seen[:, None] & (d[None, :] < DIM)
            k = _numbers(k_at, k_seen, meanings, dtype, IS_BYTES)
            logits = tl.dot(queries, tl.trans(k), logits, input_precision="ieee")
        logits = logits * scale
        if HAS_CAP:
            # tanh, by what does not overflow.
            small = tl.exp(-2.0 * tl.abs(logits) / soft_cap)
            size = soft_cap * (1.0 - small) / (1.0 + small)
            logits = tl.where(logits < 0, -size, size)
        sees = (place[None, :] >= lo[:, None]) & (place[None, :] < hi[:, None])
        logits = tl.where(sees, logits, float("-inf"))
        now = tl.maximum(m, tl.max(logits, axis=1))
        # Where a query has seen no key, exp(-inf - -inf) would be NaN; any finite stand-in gives the right zeros.
        base = tl.where(now == float("-inf"), 0.0, now)
        kept, weights = tl.exp(m - base), tl.exp(logits - base[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        v_at, v_seen = value_rows[:, None] + v_d[None, :], seen[:, None] & (v_d[None, :] < V_DIM)
        v = _numbers(v_at, v_seen, meanings, dtype, IS_BYTES)
        # What is no number makes the sums of those no numbers that see its key: of others it would, for 0 * inf is NaN.
        is_sound = tl.abs(v.to(tl.float32)) < float("inf")
        is_fault = tl.max((1 - is_sound.to(tl.int32)), axis=1)
        v = tl.where(is_sound, v, 0.0).to(dtype)
        kept = tl.where(tl.max(tl.where(sees, is_fault[None, :], 0), axis=1) > 0, float("nan"), kept)
        acc = tl.dot(weights.to(dtype), v, acc * kept[:, None], input_precision="ieee")
        m = now
    is_empty = total == 0.0
    whole = tl.where(is_empty, 1.0, total)
    to = ((begin_q + query - first_query) * group * num_kv_heads + kv_head * group + head) * tl.num_programs(2) + shard
    tl.store(
        out + to[:, None] * V_DIM + v_d[None, :], acc / whole[:, None], mask=is_row[:, None] & (v_d[None, :] < V_DIM)
    )
    tl.store(lse + to, tl.where(is_empty, float("-inf"), tl.log(whole) + m), mask=is_row)
