"""The pool of KV blocks, replicated on every rank: pure bookkeeping, so all ranks hand out the same ids."""

from __future__ import annotations

from bisect import insort


class BlockPool:
    """Hands out block ids in `[0, num_blocks)`, lowest first, so that a sequence's blocks tend to be neighbours.

    Neighbouring blocks matter: a backend can read a run of them in place.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """`n` blocks, ascending; a run of neighbours when there is one. ValueError when fewer are free."""
        if n < 0:
            raise ValueError(f"{n} blocks wanted: a number from 0 was expected")
        if n > len(self._free):
            raise ValueError(f"{n} blocks wanted, {len(self._free)} of {self.num_blocks} are free")
        start = self._first_run(n)
        blocks = self._free[start : start + n]
        del self._free[start : start + n]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Take blocks back. ValueError when one is not in use (freed twice, or never handed out)."""
        for block in blocks:
            if block not in self._used:
                raise ValueError(f"block {block} is not in use")
            self._used.remove(block)
            insort(self._free, block)

    def check_integrity(self) -> None:
        """Free and used blocks together are all blocks, each once. ValueError names what leaked."""
        lost = set(range(self.num_blocks)) - set(self._free) - self._used
        twice = self._used & set(self._free)
        if lost or twice or len(self._free) + len(self._used) != self.num_blocks:
            raise ValueError(f"block pool is inconsistent: lost {sorted(lost)}, both free and used {sorted(twice)}")

    def _first_run(self, n: int) -> int:
        """Index in the free list where `n` consecutive ids start; 0 when there is no such run."""
        free = self._free
        start = 0
        for i in range(1, len(free)):
            if i - start >= n:
                return start
            if free[i] != free[i - 1] + 1:
                start = i
        return start if len(free) - start >= n else 0
