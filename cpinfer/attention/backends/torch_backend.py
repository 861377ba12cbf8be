"""Attention with torch alone: the flash kernel on CPU, plain matrix products elsewhere (exact, not fast).

Keys are read in place. Blocks that are neighbours in the cache form a *run*, a strided view that the kernel takes as it
is; a row of several runs is one kernel call per run and a merge of their states. Only a table too scattered for that is
gathered into a copy.

Rows of one query over few keys are another matter, since a call costs as much as they do: those of like length are
copied side by side and share a call.

A row with a window is cut into tiles of queries, each over its own keys, so those are one view or one copy. A soft cap
has no kernel on CPU: its layers take the plain products, too.

Keys of a smaller dtype than the queries' (fp8 caches) are cast to it before a call, as much as the call takes: a layer
then copies what it attends to, one run at a time. That is memory saved, not time: on a CPU core one query over a long
context takes several times as long.

    block table  7 8 9 2 3        runs  [7, 10) [2, 4)        two views, two calls, one merge
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import (
    dense_attention,
    dense_single_queries,
    flash_attention_cpu,
    flash_single_queries_cpu,
)
from cpinfer.ops.float8 import take_rows
from cpinfer.ops.states import State, merge_states

# Shorter runs than this, on average, and copying the keys is cheaper than another kernel call and merge: a call costs
# about 10 us however few its keys are, in which a core copies a few hundred keys of a few heads.
MIN_RUN_TOKENS = 256

# Rows of one query over at most so many keys share a call, with others whose number of keys has the same power of two
# above it. More keys take longer to copy than a call.
MAX_SHARED_KEYS, MIN_SHARED_KEYS, MIN_SHARED_ROWS = 64, 8, 4

# On CPU a shared prefix has to save so many keys per query, since every row's other keys are a call of their own.
MIN_SAVED_KEYS = 256

# Slots [lo, hi) of the flattened store.
Run = tuple[int, int]


@dataclass(frozen=True)
class _Segment:
    """Keys that one kernel call sees: a view of slots `[lo, hi)`, or the copy of `index` where they are scattered."""

    keys: slice | Tensor
    causal: bool

    def take(self, store: Tensor, dtype: torch.dtype) -> Tensor:
        """A view where it can be one."""
        return (store[self.keys] if isinstance(self.keys, slice) else take_rows(store, self.keys)).to(dtype)


@dataclass(frozen=True)
class _SharedCall:
    """Rows of one query each: which `queries [B]`, the slots of their keys `[B, S]`, and how many of those `[B]`.

    A row with less than S keys repeats its last, which is as finite as its others.
    """

    queries: Tensor
    slots: Tensor
    num_keys: Tensor


def unfit(device: torch.device, needs: AttentionNeeds) -> UserError | None:
    """None: it can do all that there is, on every device."""
    return None


def device_bytes(device: torch.device, needs: AttentionNeeds) -> int:
    """Nothing that lasts longer than a call."""
    return 0


def make(device: torch.device, needs: AttentionNeeds) -> TorchBackend:
    """It needs no check: it is the definition of attention, and tests hold it to that."""
    return TorchBackend(device)


class TorchBackend:
    """Plans rows into kernel calls; holds no state, so any number of plans are valid at once."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Elsewhere calls cost something else, which has not been measured.
        self.min_saved_keys: int | None = MIN_SAVED_KEYS if device.type == "cpu" else None

    def plan(self, rows: AttentionRows) -> TorchPlan:
        shared = _rows_to_share(rows)
        calls = []
        each = zip(np.cumsum(rows.q_lens).tolist(), rows.q_lens.tolist(), runs_of(rows), strict=True)
        for row, (end, q_len, runs) in enumerate(each):
            if not runs or q_len == 0 or row in shared:
                continue
            segments = []
            if rows.window is not None:
                segments = self._segments(runs, causal=True)
            elif rows.causal and q_len > 1:
                # What all queries see, and the square in which they see each other.
                context, square = _split(runs, sum(hi - lo for lo, hi in runs) - q_len)
                segments = [*self._segments(context, causal=False), *self._segments(square, causal=True)]
            else:
                segments = self._segments(runs, causal=False)
            calls.append((slice(end - q_len, end), segments))
        shared_calls = [self._shared_call(rows, some) for some in _alike(rows, shared)]
        return TorchPlan(calls, shared_calls, rows.num_queries, rows.window, rows.v_is_prefix_of_k, self._device)

    def _shared_call(self, rows: AttentionRows, some: list[int]) -> _SharedCall:
        queries = np.cumsum(rows.q_lens, dtype=np.int64)[some] - 1
        num_keys = (rows.kv_hi - rows.kv_lo)[some].astype(np.int64)
        index = rows.kv_lo[some, None] + np.minimum(np.arange(num_keys.max()), num_keys[:, None] - 1)
        block, offset = np.divmod(index, rows.block_size)
        slots = rows.block_ids[rows.block_indptr[:-1][some, None] + block].astype(np.int64) * rows.block_size + offset
        return _SharedCall(*(torch.from_numpy(array).to(self._device) for array in (queries, slots, num_keys)))

    def _segments(self, runs: list[Run], *, causal: bool) -> list[_Segment]:
        # A causal square is one call or a copy: split by keys it would no longer be a triangle.
        if len(runs) <= 1 or (not causal and sum(hi - lo for lo, hi in runs) >= len(runs) * MIN_RUN_TOKENS):
            return [_Segment(slice(lo, hi), causal) for lo, hi in runs]
        index = np.concatenate([np.arange(lo, hi) for lo, hi in runs])
        return [_Segment(torch.from_numpy(index).to(self._device), causal)]


class TorchPlan:
    """Kernel calls of one step: for each row that has keys its queries and the segments of keys they see.

    All layers of a step have results of one shape, so they share one place for them, made when the first layer runs.
    """

    def __init__(
        self,
        calls: list[tuple[slice, list[_Segment]]],
        shared_calls: list[_SharedCall],
        num_queries: int,
        window: int | None,
        v_is_prefix_of_k: bool,
        device: torch.device,
    ) -> None:
        self._calls = calls
        self._shared_calls = shared_calls
        self._window = window
        self._num_queries = num_queries
        self._v_is_prefix_of_k = v_is_prefix_of_k
        self._results: State | None = None
        self._has_flash = device.type == "cpu"

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        T = len(q)
        if self._num_queries != T:
            raise ValueError(f"{T} queries were given to a plan of {self._num_queries}")
        q = q.contiguous()  # one query of all heads can then be read without another copy
        has_flash, V = self._has_flash and soft_cap is None, values.shape[-1]
        if has_flash:
            attend = partial(flash_attention_cpu, scale=scale)
        else:
            attend = partial(dense_attention, scale=scale, soft_cap=soft_cap)
        out, lse = self._room(q, V)
        for queries, segments in self._calls:
            states = []
            for segment in segments:
                k = segment.take(keys, q.dtype)
                v = self._values_in(k, V, has_flash) if self._v_is_prefix_of_k else segment.take(values, q.dtype)
                part, part_lse = attend(q[queries], k, v, causal=segment.causal, window=self._window)
                states.append((part[..., :V], part_lse))
            out[queries], lse[queries] = merge_states(states)
        for shared in self._shared_calls:
            k = take_rows(keys, shared.slots).to(q.dtype)
            if self._v_is_prefix_of_k:
                v = self._values_in(k, V, has_flash)
            else:
                v = take_rows(values, shared.slots).to(q.dtype)
            if has_flash:
                state = flash_single_queries_cpu(q[shared.queries], k, v, shared.num_keys, scale=scale)
            else:
                state = dense_single_queries(q[shared.queries], k, v, shared.num_keys, scale=scale, soft_cap=soft_cap)
            out[shared.queries], lse[shared.queries] = state[0][..., :V], state[1]
        return out, lse

    @staticmethod
    def _values_in(keys: Tensor, v_dim: int, has_flash: bool) -> Tensor:
        """Values that are columns of keys are never copied of their own. The flash kernel wants as many of them as of
        the keys': what is too much of its output is cut off, which costs less than a copy."""
        return keys if has_flash else keys[..., :v_dim]

    def _room(self, q: Tensor, v_dim: int) -> State:
        """`out [T, H, V]` and `lse [T, H]`, in which rows without keys are `(0, -inf)` and stay so."""
        T, H, _ = q.shape
        if self._results is None or self._results[0].shape != (T, H, v_dim):
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            self._results = q.new_zeros(T, H, v_dim), torch.full((T, H), -torch.inf, dtype=wide, device=q.device)
        return self._results


def _rows_to_share(rows: AttentionRows) -> frozenset[int]:
    """Rows whose keys cost less than a call; none under a window, which is another number of keys."""
    kv_lens = rows.kv_hi - rows.kv_lo
    few = (rows.q_lens == 1) & (kv_lens > 0) & (kv_lens <= MAX_SHARED_KEYS)
    found = np.flatnonzero(few).tolist() if rows.window is None else []
    return frozenset(found if len(found) >= MIN_SHARED_ROWS else [])


def _alike(rows: AttentionRows, shared: frozenset[int]) -> list[list[int]]:
    """Rows of like lengths together: padded to the longest, none is padded to more than twice its own."""
    groups: dict[int, list[int]] = {}
    for row in sorted(shared):
        num_keys = int(rows.kv_hi[row] - rows.kv_lo[row])
        groups.setdefault(max(MIN_SHARED_KEYS, 1 << (num_keys - 1).bit_length()), []).append(row)
    return list(groups.values())


def runs_of(rows: AttentionRows) -> list[list[Run]]:
    """For every row the slot ranges that hold its keys, in key order, neighbours joined; none for a row without keys.

    >>> rows = AttentionRows.build([1, 1], [18, 0], [[7, 8, 9, 2, 3], []], block_size=4, causal=False)
    >>> runs_of(rows)
    [[(28, 40), (8, 14)], []]
    """
    block_size = rows.block_size
    full = rows.kv_hi > rows.kv_lo
    first = np.where(full, rows.block_indptr[:-1] + rows.kv_lo // block_size, 0)
    last = np.where(full, rows.block_indptr[:-1] + (rows.kv_hi - 1) // block_size, -1)
    # A run breaks where the next block is no neighbour, and at both ends of every row.
    breaks = np.ones(len(rows.block_ids) + 1, dtype=bool)
    breaks[1:-1] = np.diff(rows.block_ids) != 1
    breaks[first[full]] = True
    breaks[last[full] + 1] = True
    starts = np.flatnonzero(breaks)
    lo = rows.block_ids[starts[:-1]].astype(np.int64) * block_size
    hi = (rows.block_ids[starts[1:] - 1].astype(np.int64) + 1) * block_size
    run_first, run_last = np.searchsorted(starts, first[full]), np.searchsorted(starts, last[full] + 1) - 1
    # The first and last block of a row may be used in part; where both are one run, both cuts apply to it.
    lo[run_first] += rows.kv_lo[full] % block_size
    hi[run_last] -= -rows.kv_hi[full] % block_size
    runs = list(zip(lo.tolist(), hi.tolist(), strict=True))
    found = iter(zip(run_first.tolist(), run_last.tolist(), strict=True))
    spans = [next(found) if is_full else (0, -1) for is_full in full.tolist()]
    return [runs[a : b + 1] for a, b in spans]


def _split(runs: list[Run], num_keys: int) -> tuple[list[Run], list[Run]]:
    """The runs of the first `num_keys` keys, and those of the rest.

    >>> _split([(28, 40), (8, 14)], 13)
    ([(28, 40), (8, 9)], [(9, 14)])
    """
    before: list[Run] = []
    for i, (lo, hi) in enumerate(runs):
        if num_keys < hi - lo:
            cut = lo + num_keys
            return [*before, *([(lo, cut)] if num_keys else [])], [(cut, hi), *runs[i + 1 :]]
        before.append((lo, hi))
        num_keys -= hi - lo
    return before, []
