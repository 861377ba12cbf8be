"""The pool of KV blocks, replicated on every rank: pure bookkeeping, so all ranks hand out the same ids.

A block is in use while anyone refers to it: the sequences that read it (several, where they share a prefix), and the
prefix cache. Neighbouring blocks matter, since a backend can read a run of them in place. So a sequence is placed where
it has room to grow, and its next block is the one behind its last whenever that is free:

    a a . . b b . . . .        a, then b, of 2 blocks with room for 4; a's third block goes behind its second
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class BlockPool:
    """Block ids in `[0, num_blocks)` with a count of references each; free are those with none."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._refs = np.zeros(num_blocks, dtype=np.int32)
        # Where the next sequence is placed; behind the room that the last one was given.
        self._next = 0

    def allocate(self, n: int, *, room: int = 0, after: int | None = None) -> list[int]:
        """`n` blocks with one reference each. ValueError when fewer are free.

        With `after`, a sequence's last block, first the free blocks right behind it. Otherwise neighbours, in a place
        where `room` blocks fit if there is one, else ascending wherever they are free.
        """
        if not 0 <= n <= self.num_free:
            raise ValueError(f"{n} blocks wanted, {self.num_free} of {self.num_blocks} are free")
        blocks = [] if after is None else self._run_behind(after, n)
        if len(blocks) < n:
            blocks += self._place(n - len(blocks), max(n, room), exclude=blocks)
        self._refs[blocks] = 1
        self.num_free -= n
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block. ValueError when one is free."""
        self._refs += self._counts(blocks, taken=False)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block. ValueError when one has fewer than are taken away; then nothing changes."""
        counts = self._counts(blocks, taken=True)
        self._refs -= counts
        self.num_free += int(((counts > 0) & (self._refs == 0)).sum())

    def refs(self, block: int) -> int:
        """References to a block; 0 when it is free."""
        return int(self._refs[block])

    def check_integrity(self, referenced: Iterable[int]) -> None:
        """Every reference is known to a holder: `referenced` lists theirs, all of them. ValueError names leaks."""
        known = np.bincount(np.fromiter(referenced, dtype=np.int64), minlength=self.num_blocks)
        wrong = np.flatnonzero(known != self._refs)
        if len(wrong):
            raise ValueError(
                f"block pool is inconsistent: blocks {wrong.tolist()} have {self._refs[wrong].tolist()} references, "
                f"their holders know of {known[wrong].tolist()}"
            )
        if self.num_free != int((self._refs == 0).sum()):
            raise ValueError(f"block pool is inconsistent: {self.num_free} blocks counted as free")

    def _counts(self, blocks: Sequence[int], *, taken: bool) -> NDArray[np.int32]:
        """`[num_blocks]` how often each block is named. ValueError for a free one, or with fewer references to take."""
        named = np.asarray(blocks, dtype=np.int64)
        outside = named[(named < 0) | (named >= self.num_blocks)]
        if len(outside):
            raise ValueError(f"block {outside[0]} is not in use")
        counts = np.bincount(named, minlength=self.num_blocks).astype(np.int32)
        missing = np.flatnonzero((counts > 0) & (self._refs < (counts if taken else 1)))
        if len(missing):
            raise ValueError(f"block {missing[0]} is not in use")
        return counts

    def _run_behind(self, block: int, n: int) -> list[int]:
        behind = self._refs[block + 1 : block + 1 + n] == 0
        run = len(behind) if behind.all() else int(behind.argmin())
        return list(range(block + 1, block + 1 + run))

    def _place(self, n: int, room: int, exclude: Sequence[int]) -> list[int]:
        free = self._refs == 0
        free[list(exclude)] = False
        edges = np.flatnonzero(np.diff(free, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        # Of the runs from `_next` on the first with enough room, going round once; then any run that holds n.
        begins = np.maximum(starts, self._next)
        for candidates, wanted in ((begins, room), (starts, room), (starts, n)):
            fits = np.flatnonzero(ends - candidates >= wanted)
            if len(fits):
                start = int(candidates[fits[0]])
                self._next = (start + room) % self.num_blocks if wanted == room else self._next
                return list(range(start, start + n))
        blocks: list[int] = np.flatnonzero(free)[:n].tolist()
        return blocks
