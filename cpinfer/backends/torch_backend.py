"""Attention with torch alone: the flash kernel on CPU, plain matrix products elsewhere (exact, not fast).

Keys are read in place. Blocks that are neighbours in the cache form a *run*, a strided view that the kernel takes as it
is; a row of several runs is one kernel call per run and a merge of their states. Only a table too scattered for that is
gathered into a copy.

    block table  7 8 9 2 3        runs  [7, 10) [2, 4)        two views, two calls, one merge
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention, flash_attention_cpu
from cpinfer.ops.states import State, merge_states

# Shorter runs than this, on average, and copying the keys is cheaper than another kernel call and merge: a call costs
# about 10 us however few its keys are, in which a core copies a few hundred keys of a few heads.
MIN_RUN_TOKENS = 256


@dataclass(frozen=True)
class _Segment:
    """Keys that one kernel call sees: a view of slots `[lo, hi)`, or the copy of `index` where they are scattered."""

    keys: slice | Tensor
    causal: bool

    def take(self, store: Tensor) -> Tensor:
        return store[self.keys] if isinstance(self.keys, slice) else store.index_select(0, self.keys)


class TorchBackend:
    """Plans rows into kernel calls; holds no state, so any number of plans are valid at once."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def plan(self, rows: AttentionRows) -> TorchPlan:
        ends = np.cumsum(rows.q_lens).tolist()
        calls = []
        for row, (end, q_len) in enumerate(zip(ends, rows.q_lens.tolist(), strict=True)):
            lo, hi = int(rows.kv_lo[row]), int(rows.kv_hi[row])
            if lo == hi or q_len == 0:
                continue
            table = rows.block_ids[rows.block_indptr[row] : rows.block_indptr[row + 1]]
            # What all queries see, and the square in which they see each other.
            square = hi - q_len if rows.causal and q_len > 1 else hi
            segments = self._segments(table, lo, square, rows.block_size, causal=False)
            segments += self._segments(table, square, hi, rows.block_size, causal=True)
            calls.append((slice(end - q_len, end), segments))
        return TorchPlan(calls, rows.num_queries, self._device)

    def _segments(self, table: NDArray[np.int32], lo: int, hi: int, block_size: int, *, causal: bool) -> list[_Segment]:
        if lo == hi:
            return []
        runs = _runs(table, lo, hi, block_size)
        # A causal square is one call or a copy: split by keys it would no longer be a triangle.
        if len(runs) == 1 or (not causal and hi - lo >= len(runs) * MIN_RUN_TOKENS):
            return [_Segment(slice(a, b), causal) for a, b in runs]
        index = np.concatenate([np.arange(a, b) for a, b in runs])
        return [_Segment(torch.from_numpy(index).to(self._device), causal)]


class TorchPlan:
    """Kernel calls of one step: for each row that has keys its queries and the segments of keys they see."""

    def __init__(self, calls: list[tuple[slice, list[_Segment]]], num_queries: int, device: torch.device) -> None:
        self._calls = calls
        self._num_queries = num_queries
        self._attend = flash_attention_cpu if device.type == "cpu" else dense_attention

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> State:
        T, H, _ = q.shape
        if self._num_queries != T:
            raise ValueError(f"{T} queries were given to a plan of {self._num_queries}")
        q = q.contiguous()  # one query of all heads can then be read without another copy
        out = q.new_zeros(T, H, values.shape[-1])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full((T, H), -torch.inf, dtype=wide, device=q.device)
        for queries, segments in self._calls:
            row = q[queries]
            states = [self._attend(row, s.take(keys), s.take(values), scale=scale, causal=s.causal) for s in segments]
            out[queries], lse[queries] = merge_states(states)
        return out, lse


def _runs(table: NDArray[np.int32], lo: int, hi: int, block_size: int) -> list[tuple[int, int]]:
    """Half-open slot ranges that hold the keys `[lo, hi)` of a block table, in key order, neighbours joined.

    >>> _runs(np.array([7, 8, 9, 2, 3], dtype=np.int32), 3, 18, block_size=4)
    [(31, 40), (8, 14)]
    """
    first, last = lo // block_size, (hi - 1) // block_size
    blocks = table[first : last + 1].astype(np.int64)
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    starts = np.concatenate([[0], breaks])
    ends = np.concatenate([breaks, [len(blocks)]])
    runs = [
        (int(blocks[a]) * block_size, int(blocks[b - 1] + 1) * block_size) for a, b in zip(starts, ends, strict=True)
    ]
    runs[0] = (runs[0][0] + lo - first * block_size, runs[0][1])
    runs[-1] = (runs[-1][0], runs[-1][1] - ((last + 1) * block_size - hi))
    return runs
