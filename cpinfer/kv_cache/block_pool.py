"""The pool of KV blocks, replicated on every rank: pure bookkeeping, so all ranks hand out the same ids.

A block is in use while anyone refers to it: the sequences that read it (several, where they share a prefix), and the
prefix cache. Neighbouring blocks matter, since a backend can read a run of them in place. So a sequence is placed where
it has room to grow, and its next block is the one behind its last whenever that is free:

    a a . . b b . . . .        a, then b, of 2 blocks with room for 4; a's third block goes behind its second

A call costs by the blocks that it names, not by those of the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from cpinfer.kv_cache.free_block_tree import FreeBlockTree


class BlockPool:
    """Block ids in `[0, num_blocks)` with a count of references each; free are those with none."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._refs = [0] * num_blocks
        self._free = FreeBlockTree(num_blocks)
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
        self._take(blocks)
        if len(blocks) < n:
            blocks += self._place(n - len(blocks), max(n, room))
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block. ValueError when one is free; then nothing changes."""
        for block in blocks:
            self._check(block, 1)
        for block in blocks:
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block. ValueError when one has fewer than are taken away; then nothing changes."""
        counts = Counter(blocks)
        for block, count in counts.items():
            self._check(block, count)
        for block, count in counts.items():
            self._refs[block] -= count
        freed = [block for block in counts if self._refs[block] == 0]
        self._free.give(freed)
        self.num_free += len(freed)

    def refs(self, block: int) -> int:
        """References to a block; 0 when it is free."""
        return self._refs[block]

    def check_integrity(self, referenced: Iterable[int]) -> None:
        """Every reference is known to a holder: `referenced` lists theirs, all of them. ValueError names leaks."""
        known = np.bincount(np.fromiter(referenced, dtype=np.int64), minlength=self.num_blocks)
        refs = np.array(self._refs, dtype=np.int64)
        wrong = np.flatnonzero(known != refs)
        if len(wrong):
            raise ValueError(
                f"block pool is inconsistent: blocks {wrong.tolist()} have {refs[wrong].tolist()} references, "
                f"their holders know of {known[wrong].tolist()}"
            )
        if self.num_free != int((refs == 0).sum()):
            raise ValueError(f"block pool is inconsistent: {self.num_free} blocks counted as free")
        misplaced = np.flatnonzero((refs == 0) != np.array(self._free.flags(), dtype=bool))
        if len(misplaced):
            raise ValueError(f"block pool is inconsistent: blocks {misplaced.tolist()} are searched wrongly")

    def _check(self, block: int, references: int) -> None:
        if not 0 <= block < self.num_blocks or self._refs[block] < references:
            raise ValueError(f"block {block} is not in use")

    def _run_behind(self, block: int, n: int) -> list[int]:
        return list(takewhile(self._free.is_free, range(block + 1, block + 1 + n)))

    def _place(self, n: int, room: int) -> list[int]:
        """Take `n` blocks: where `room` fit, from `_next` on and going round once; else the first run that holds n."""
        start = self._free.first(room, self._next)
        if start is None:
            start = self._free.first(room)
        if start is not None:
            self._next = (start + room) % self.num_blocks
        else:
            start = self._free.first(n)
        if start is None:
            return self._scattered(n)
        return self._take(range(start, start + n))

    def _scattered(self, n: int) -> list[int]:
        """Take the first `n` free blocks."""
        blocks: list[int] = []
        while len(blocks) < n:
            start = self._free.first(1, blocks[-1] + 1 if blocks else 0)
            assert start is not None, "so many are free"
            blocks += [start, *self._run_behind(start, n - len(blocks) - 1)]
        return self._take(blocks)

    def _take(self, blocks: Iterable[int]) -> list[int]:
        taken = list(blocks)
        for block in taken:
            self._refs[block] = 1
        self._free.take(taken)
        self.num_free -= len(taken)
        return taken
