"""Rows that begin with the same blocks: what neighbours share is attended to once, by the queries of all of them.

Samples of one prompt share its blocks, and stand side by side. Rows are cut in two, and the states merged:

    block tables   row 0   7 8 3        shared   | q0 q1 q2 | keys of 7 8 |        own   | q0 | keys of 3   |
                   row 1   7 8 4 5               | q3       | none        |              | q1 | keys of 4 5 |
                   row 2   7 8 6                                                         | q2 | keys of 6   |
                   row 3   9 2                                                           | q3 | keys of 9 2 |

Kernels then read the shared keys once for three rows, and as many queries share a tile. Only blocks that all rows of a
run see whole are shared, so both halves begin at a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import IntArray


@dataclass(frozen=True)
class SharedPrefix:
    """Rows cut in two, for the same queries in the same order.

    `shared`: a row for each run of neighbours, over the keys that all of them see; without keys where that is none.
    `own`: the rows, over the other keys. `num_saved_keys`: keys that are read less than by rows left whole.
    """

    shared: AttentionRows
    own: AttentionRows
    num_saved_keys: int

    def grown(self, before: AttentionRows, after: AttentionRows) -> SharedPrefix:
        """The same cut of `after`, to which the rows that were cut, `before`, have grown by at most a block each.

        What neighbours share ends where one of them has a block of its own, or began to write: it never grows.
        """

        def blocks_of(rows: IntArray) -> list[int]:
            last: list[int] = after.block_ids[after.block_indptr[rows + 1] - 1].tolist()
            return last

        return replace(self, own=self.own.grown(self.own.kv_hi + (after.kv_hi - before.kv_hi), blocks_of))


def share_where_it_saves(rows: AttentionRows, min_saved_keys: int | None) -> SharedPrefix | None:
    """What neighbours share, where that saves so many keys *per query*; None never does. ValueError for causal rows."""
    return None if min_saved_keys is None else share_prefix(rows, min_saved_keys * rows.num_queries)


def share_prefix(rows: AttentionRows, min_saved_keys: int = 1) -> SharedPrefix | None:
    """What neighbours of `rows` share, None where that is nothing or saves fewer keys. ValueError for causal rows.

    >>> rows = AttentionRows.build(
    ...     [1, 1, 1, 1], [10, 15, 9, 5], [[7, 8, 3], [7, 8, 4, 5], [7, 8, 6], [9, 2]], block_size=4, causal=False
    ... )
    >>> cut = share_prefix(rows)
    >>> cut.shared.q_lens.tolist(), cut.shared.kv_hi.tolist(), cut.shared.block_ids.tolist()
    ([3, 1], [8, 0], [7, 8])
    >>> cut.own.kv_hi.tolist(), cut.own.block_ids.tolist(), cut.num_saved_keys
    ([2, 7, 1, 5], [3, 4, 5, 6, 9, 2], 16)
    """
    if rows.causal:
        raise ValueError("causal rows see different keys of what they share")
    with_last = _shared_with_last(rows)
    if not with_last.any():
        return None
    starts = np.flatnonzero(~_joins_last(with_last))
    lens = np.diff(starts, append=rows.num_rows)
    # A run shares what all its neighbours share; the first row of a run shares nothing with the one before.
    inner = with_last.copy()
    inner[starts] = np.iinfo(inner.dtype).max
    num_shared = np.where(lens > 1, np.minimum.reduceat(inner, starts), 0)
    num_saved_keys = int(((lens - 1) * num_shared).sum()) * rows.block_size
    if num_saved_keys < min_saved_keys:
        return None
    own = rows.above(np.repeat(num_shared, lens) * rows.block_size)
    # Neighbours that share nothing are one row without keys.
    kept = (num_shared > 0) | (np.concatenate([[1], num_shared[:-1]]) > 0)
    starts, num_shared = starts[kept], num_shared[kept]
    first = rows.block_indptr[starts].tolist()
    shared = AttentionRows.build(
        np.add.reduceat(rows.q_lens, starts),
        (num_shared * rows.block_size).astype(np.int32),
        [rows.block_ids[at : at + n].tolist() for at, n in zip(first, num_shared.tolist(), strict=True)],
        block_size=rows.block_size,
        causal=False,
    )
    shared = replace(shared, v_is_prefix_of_k=rows.v_is_prefix_of_k)
    return SharedPrefix(shared, own, num_saved_keys)


def _shared_with_last(rows: AttentionRows) -> IntArray:
    """`[rows]` blocks that each row begins with as the row before it does, and both see whole; 0 for the first row."""
    whole = np.where(rows.kv_lo == 0, rows.kv_hi // rows.block_size, 0).astype(np.int64)
    shared: IntArray = np.minimum(whole, np.concatenate([[0], whole[:-1]]))
    begins, ids = rows.block_indptr[:-1], rows.block_ids
    # Most strangers differ in their first block, and are done with it.
    some = np.flatnonzero(shared)
    shared[some[ids[begins[some]] != ids[begins[some - 1]]]] = 0
    # A slice per row is compared in microseconds, where one index of all blocks of long prompts takes milliseconds.
    for row in np.flatnonzero(shared).tolist():
        at, last, num_blocks = begins[row], begins[row - 1], shared[row]
        differs = ids[at : at + num_blocks] != ids[last : last + num_blocks]
        place = differs.argmax()
        if differs[place]:
            shared[row] = place
    return shared


def _joins_last(with_last: IntArray) -> NDArray[np.bool_]:
    """Whether each row is of one run with the row before it.

    Groups may have a little in common with each other (a system prompt), and must not be one run for that: a row joins
    where it shares at least half as much as its neighbours do with theirs.
    """
    around = np.concatenate([[0], with_last, [0]])
    joins: NDArray[np.bool_] = (with_last > 0) & (2 * with_last >= np.maximum(around[:-2], around[2:]))
    return joins
