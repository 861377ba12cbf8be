"""What a backend is asked to attend to: rows of queries, each over a key range of its own block table."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.shards import IntArray

Int32Array = NDArray[np.int32]


@dataclass(frozen=True)
class AttentionRows:
    """A batch of variable-length attention problems over one paged store of keys and values.

    Row i has the next `q_lens[i]` packed queries, which see the keys with index `[kv_lo[i], kv_hi[i])` of the dense
    sequence that its block table spells out. Under `causal` the last query sees all of them, the one before it one key
    less, and so on (aligned to the end of the row), of which a `window` leaves it the last so many. A row with
    `kv_lo == kv_hi` is empty: output 0, lse -inf. `v_is_prefix_of_k`: the values of the store are the first columns of
    its keys, as of latents, and are not stored beside them. `begins`: where the table of each row begins in the keys of
    its sequence, or of this shard of it, which only those ask who count from there; None is 0 for all.
    """

    q_lens: Int32Array
    kv_lo: Int32Array
    kv_hi: Int32Array
    block_indptr: Int32Array
    block_ids: Int32Array
    block_size: int
    causal: bool
    window: int | None = None
    v_is_prefix_of_k: bool = False
    begins: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n = len(self.q_lens)
        if not len(self.kv_lo) == len(self.kv_hi) == len(self.block_indptr) - 1 == n:
            raise ValueError("q_lens, kv_lo, kv_hi and block_indptr disagree on the number of rows")
        if ((self.kv_lo > self.kv_hi) | (self.kv_lo < 0)).any():
            raise ValueError("key ranges must be [lo, hi) with 0 <= lo <= hi")
        if self.block_indptr[0] != 0 or self.block_indptr[-1] != len(self.block_ids):
            raise ValueError("block_indptr does not cover block_ids")
        if self.are_short_of(self.kv_hi).any():
            raise ValueError("a block table is too short for its kv_hi")
        if self.causal:
            kv_lens = self.kv_hi - self.kv_lo
            # With fewer keys than queries the first queries would see nothing: no plan of ours means that.
            if ((kv_lens > 0) & (kv_lens < self.q_lens)).any():
                raise ValueError("a causal row needs at least as many keys as queries")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError("a window is at least 1 and needs causal rows: elsewhere the key range says what is seen")

    @classmethod
    def build(
        cls,
        q_lens: Sequence[int] | Int32Array,
        kv_hi: Sequence[int] | Int32Array,
        block_tables: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        block_size: int,
        causal: bool,
        begins: NDArray[np.int64] | None = None,
    ) -> AttentionRows:
        """Rows that see the first `kv_hi` keys of their tables; each table is cut to the blocks it needs."""
        kv_lens = np.asarray(kv_hi, dtype=np.int32)
        needed = (-(-kv_lens // block_size)).tolist()
        tables = [t if len(t) == n else t[:n] for t, n in zip(block_tables, needed, strict=True)]
        lens = np.fromiter(map(len, tables), dtype=np.int32, count=len(tables))
        return cls(
            q_lens=np.asarray(q_lens, dtype=np.int32),
            kv_lo=np.zeros(len(tables), dtype=np.int32),
            kv_hi=kv_lens,
            block_indptr=ends_of(lens),
            block_ids=_concatenate(tables, int(lens.sum())),
            block_size=block_size,
            causal=causal,
            begins=begins,
        )

    def are_short_of(self, kv_hi: Int32Array) -> NDArray[np.bool_]:
        """`[rows]`: whose tables do not cover `kv_hi` keys."""
        short: NDArray[np.bool_] = np.diff(self.block_indptr) * self.block_size < kv_hi
        return short

    def grown(self, kv_hi: Int32Array, blocks_of: Callable[[IntArray], Sequence[int]]) -> AttentionRows:
        """The same rows with keys up to `kv_hi`, for which none needs more than a block.

        `blocks_of` says which, for the rows that do need one, ascending.
        """
        is_short = self.are_short_of(kv_hi)
        short = np.flatnonzero(is_short)
        if not len(short):
            return replace(self, kv_hi=kv_hi)
        blocks = blocks_of(short)
        indptr = self.block_indptr.copy()
        indptr[1:] += np.cumsum(is_short, dtype=np.int32)
        # Tables may be long, and those that grow are few: what lies between their ends is copied as it lies.
        block_ids, begin = np.empty(len(self.block_ids) + len(blocks), dtype=np.int32), 0
        for i, (end, block) in enumerate(zip(self.block_indptr[short + 1].tolist(), blocks, strict=True)):
            block_ids[begin + i : end + i] = self.block_ids[begin:end]
            block_ids[end + i] = block
            begin = end
        block_ids[begin + len(blocks) :] = self.block_ids[begin:]
        return replace(self, kv_hi=kv_hi, block_indptr=indptr, block_ids=block_ids)

    def over(self, layout: KVLayout) -> AttentionRows:
        """The same rows over a store of this layout."""
        if layout.v_is_prefix_of_k == self.v_is_prefix_of_k:
            return self  # rows that are made anew are checked anew, in every step
        return replace(self, v_is_prefix_of_k=layout.v_is_prefix_of_k)

    def within(self, window: int) -> AttentionRows:
        """The same causal rows under a window, without the keys that no query of theirs sees."""
        return replace(self.above(self.kv_hi - self.q_lens - window + 1), window=window)

    def above(self, kv_lo: NDArray[np.integer]) -> AttentionRows:
        """The same rows without the keys below `kv_lo [rows]`, and without the blocks that held only such."""
        lo = np.clip(kv_lo, self.kv_lo, self.kv_hi)
        has_keys = lo < self.kv_hi
        num_blocks = np.diff(self.block_indptr)
        dropped = np.where(has_keys, lo // self.block_size, num_blocks)
        kept = zip((self.block_indptr[:-1] + dropped).tolist(), self.block_indptr[1:].tolist(), strict=True)
        return replace(
            self,
            kv_lo=np.where(has_keys, lo - dropped * self.block_size, 0).astype(np.int32),
            kv_hi=np.where(has_keys, self.kv_hi - dropped * self.block_size, 0).astype(np.int32),
            block_indptr=ends_of(num_blocks - dropped),
            block_ids=np.concatenate([self.block_ids[:0], *(self.block_ids[a:b] for a, b in kept)]),
            begins=self.places_of_tables + dropped.astype(np.int64) * self.block_size,
        )

    @property
    def places_of_tables(self) -> NDArray[np.int64]:
        """`[rows]` where each table begins."""
        return np.zeros(self.num_rows, dtype=np.int64) if self.begins is None else self.begins

    @property
    def num_rows(self) -> int:
        return len(self.q_lens)

    @property
    def num_queries(self) -> int:
        return int(self.q_lens.sum())

    def slots(self, row: int) -> NDArray[np.int64]:
        """Rows of the flattened store that row `row` sees, in key order."""
        table = self.block_ids[self.block_indptr[row] : self.block_indptr[row + 1]].astype(np.int64)
        index = np.arange(self.kv_lo[row], self.kv_hi[row])
        slots: NDArray[np.int64] = table[index // self.block_size] * self.block_size + index % self.block_size
        return slots


def ends_of(lens: NDArray[np.integer]) -> Int32Array:
    """`[n + 1]`: where each of n runs of these lengths, one behind the other, begins, and where the last ends."""
    ends = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=ends[1:])
    return ends


def _concatenate(tables: Sequence[Sequence[int] | NDArray[np.int64]], length: int) -> Int32Array:
    """Lists of numbers are chained at C speed, where an array each would cost a call; arrays are joined as they are."""
    if tables and isinstance(tables[0], np.ndarray):
        return np.concatenate(tables).astype(np.int32)
    if length and all(isinstance(table, array) for table in tables if len(table)):
        joined = bytearray().join(table for table in tables if isinstance(table, array))
        return np.frombuffer(joined, dtype=np.int32)
    return np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=length)
