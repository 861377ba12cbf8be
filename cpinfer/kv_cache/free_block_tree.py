"""Which blocks are free, so that a run of free neighbours is found without looking at all of them.

A tree over the blocks: a node of level k stands for 2**k neighbours and knows how many are free at its start, at its
end, and in its longest run. A search goes one path up and down. What has changed since the last one goes up before it,
many blocks at once; the place right where a search begins is looked at first, and as a rule is free.

    blocks    . . a a . . . .        level 3    head 2, tail 4, best 4: four fit at block 4
              2     0 |   4
"""

from __future__ import annotations

from collections.abc import Iterable


class FreeBlockTree:
    """Which of the blocks in `[0, num_blocks)` are free; all are at first.

    >>> runs = FreeBlockTree(8)
    >>> runs.take([2, 3])
    >>> [runs.first(length) for length in (2, 3, 5)]
    [0, 4, None]
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._top = max(0, num_blocks - 1).bit_length()
        # By level and node. Behind the last block nothing is free; every node has a sibling.
        self._head: list[list[int]] = []
        self._tail: list[list[int]] = []
        self._best: list[list[int]] = []
        for level in range(self._top + 1):
            whole, rest = divmod(num_blocks, 1 << level)
            self._head.append([1 << level] * whole + [rest, 0])
            self._tail.append([1 << level] * whole + [0, 0])
            self._best.append([1 << level] * whole + [rest, 0])
        # A block is all of its own run.
        self._flags = self._head[0] = self._tail[0] = self._best[0]
        # Nodes of level 1 over blocks that have changed since the tree was last searched.
        self._stale: set[int] = set()

    def is_free(self, block: int) -> bool:
        """Whether a block is free; none is outside of the pool."""
        return 0 <= block < self._num_blocks and self._flags[block] == 1

    def flags(self) -> list[int]:
        """For each block 1 when it is free, 0 when it is not."""
        return self._flags[: self._num_blocks]

    def take(self, blocks: Iterable[int]) -> None:
        """Blocks that are free no longer."""
        self._set(blocks, 0)

    def give(self, blocks: Iterable[int]) -> None:
        """Blocks that are free now."""
        self._set(blocks, 1)

    def first(self, length: int, start: int = 0) -> int | None:
        """The first block from `start` on with which `length` free neighbours begin; None where there are none."""
        if self._flags[start : start + length].count(1) == length:
            return start
        self._refresh()
        place, run = start, 0  # `run`: free blocks right before `place`, none of them before `start`
        while place < self._num_blocks:
            # The largest node that begins here.
            level = min((place & -place).bit_length() - 1, self._top) if place else self._top
            node = place >> level
            if run + self._head[level][node] >= length:
                return place - run
            if self._best[level][node] >= length:
                return self._first_within(level, node, length)
            is_free = self._head[level][node] == 1 << level
            run = run + (1 << level) if is_free else self._tail[level][node]
            place += 1 << level
        return None

    def _first_within(self, level: int, node: int, length: int) -> int:
        while level:
            left, level = 2 * node, level - 1
            if self._best[level][left] >= length:
                node = left
            elif self._tail[level][left] + self._head[level][left + 1] >= length:
                return ((left + 1) << level) - self._tail[level][left]
            else:
                node = left + 1
        return node

    def _set(self, blocks: Iterable[int], free: int) -> None:
        for block in blocks:
            self._flags[block] = free
            self._stale.add(block >> 1)

    def _refresh(self) -> None:
        """Let the tree know of all that has changed."""
        nodes = self._stale
        for level in range(1, self._top + 1):
            size = 1 << (level - 1)
            heads, tails, bests = self._head[level - 1], self._tail[level - 1], self._best[level - 1]
            for node in nodes:
                left, right = 2 * node, 2 * node + 1
                head, tail = heads[left], tails[right]
                between = tails[left] + heads[right]
                self._head[level][node] = size + heads[right] if head == size else head
                self._tail[level][node] = tails[left] + size if tail == size else tail
                self._best[level][node] = max(bests[left], bests[right], between)
            nodes = {node >> 1 for node in nodes}
        self._stale = set()
