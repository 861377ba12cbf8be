"""Places for states of sequences on the ranks of a home, replicated on every rank: pure bookkeeping.

A state is of one size however long its sequence is, and lies on one rank alone: that which computes the sequence's row
in decode steps. So whoever gets a place also gets a rank, the one with the fewest sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class StateSlot:
    """One of the slots of a rank: `rank` counts those over which the decode rows of a home are dealt."""

    rank: int
    slot: int


class StatePool:
    """`num_slots` slots on each of `num_ranks` ranks."""

    def __init__(self, num_ranks: int, num_slots: int) -> None:
        self.num_ranks = num_ranks
        self.num_slots = num_slots
        self._free = [list(range(num_slots)) for _ in range(num_ranks)]
        for free in self._free:
            heapify(free)

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    def take(self) -> StateSlot:
        """A free slot of the rank that has most of them, its lowest. ValueError when there is none."""
        rank = max(range(self.num_ranks), key=lambda r: (len(self._free[r]), -r))
        if not self._free[rank]:
            raise ValueError("no slot for a state is free")
        return StateSlot(rank, heappop(self._free[rank]))

    def release(self, slot: StateSlot) -> None:
        """Give a slot back; it must be in use."""
        heappush(self._free[slot.rank], slot.slot)

    def check_integrity(self, held: Iterable[StateSlot]) -> None:
        """`held` are those of all sequences. ValueError names slots that are lost, or held twice."""
        free = [StateSlot(rank, slot) for rank, slots in enumerate(self._free) for slot in slots]
        counts = Counter([*free, *held])
        wrong = [
            slot
            for rank in range(self.num_ranks)
            for i in range(self.num_slots)
            if counts[slot := StateSlot(rank, i)] != 1
        ]
        if wrong or len(counts) != self.num_ranks * self.num_slots:
            raise ValueError(f"slots for states are inconsistent: {wrong} are lost, or held twice")
