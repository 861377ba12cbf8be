"""Which part of a stored weight a tensor-parallel rank keeps, K and V heads that are copied for it included.

A framework cuts rows `[start, stop)` for a rank. Where K and V heads were copied first, `rep` times each, these are
rows of the copies: head j of the copies is head `j // rep` of those that are stored.

    2 KV heads of 4 rows, tp=4, rep=2       tp0     tp1     tp2      tp3
                   rows of the copies       0-3     4-7     8-11     12-15
                       stored rows read     0-3     0-3     4-7      4-7

>>> [stored_ranges(4 * tp_rank, 4 * tp_rank + 4, head_dim=4, rep=2) for tp_rank in range(4)]
[[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]]
"""

from __future__ import annotations


def stored_ranges(start: int, stop: int, *, head_dim: int, rep: int) -> list[tuple[int, int]]:
    """Ranges of stored rows, in order, that rows `[start, stop)` of the copies are; at least one, if an empty one.

    >>> stored_ranges(2, 13, head_dim=4, rep=2)
    [(2, 4), (0, 4), (4, 8), (4, 5)]
    >>> stored_ranges(2, 13, head_dim=4, rep=1)
    [(2, 13)]
    """
    if rep == 1 or start == stop:
        return [(start // rep, stop // rep)]
    ranges = []
    for head in range(start // head_dim, -(-stop // head_dim)):
        first, last = max(start, head * head_dim), min(stop, (head + 1) * head_dim)
        to_stored = (head // rep - head) * head_dim
        ranges.append((first + to_stored, last + to_stored))
    return ranges
