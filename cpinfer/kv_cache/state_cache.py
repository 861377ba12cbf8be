"""States behind prefixes, for sequences that begin alike: to states what the prefix cache is to KV.

A state is that behind so many tokens, no more and no fewer. So one is known by the key of the last whole unit before
it, and is of use where the KV of all units up to there is found as well. Pure bookkeeping, replicated on every rank.

States that prefills under way are going to leave are known too, to whom it is worth to wait for them: `announce` and
`withdraw`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence

from cpinfer.kv_cache.prefix_cache import Key
from cpinfer.layout.states import StatePlace


class StateCache:
    """`num_slots` slots on each of `num_ranks` pcp ranks, from `first_slot` on, each of which may hold a state.

    Where all do, that which was unused for longest gives way.
    """

    def __init__(self, num_ranks: int, num_slots: int, first_slot: int = 0) -> None:
        self._size = num_ranks, num_slots, first_slot
        # Taken from the end: the ranks in turn.
        self._free = [
            StatePlace(rank, first_slot + slot)
            for slot in reversed(range(num_slots))
            for rank in reversed(range(num_ranks))
        ]
        # Unused for longest first.
        self._places: OrderedDict[Key, StatePlace] = OrderedDict()
        # Only asked what it contains, never walked.
        self._being_written: set[StatePlace] = set()
        self._announced: Counter[Key] = Counter()
        self.num_evicted = 0

    def emptied(self) -> StateCache:
        """The same without a state; this one is as it was."""
        return StateCache(*self._size)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def num_known(self, keys: Sequence[Key]) -> int:
        """Of how many of the first units a state is here, the most there are."""
        return _last_of(keys, self._places)

    def num_coming(self, keys: Sequence[Key]) -> int:
        """The same, of states that prefills under way will leave."""
        return _last_of(keys, self._announced)

    def use(self, key: Key) -> StatePlace:
        """Where the state behind a unit is, which is used now. KeyError where there is none."""
        self._places.move_to_end(key)
        return self._places[key]

    def take(self, in_use: Collection[StatePlace] = ()) -> StatePlace | None:
        """A place to write a state to; another state gives way for it, but none that is `in_use`.

        Its caller inserts or releases it. None where there is no such place.
        """
        place = self._free.pop() if self._free else None
        if place is None:
            key = next((key for key, place in self._places.items() if place not in in_use), None)
            if key is None:
                return None
            place = self._places.pop(key)
            self.num_evicted += 1
        self._being_written.add(place)
        return place

    def insert(self, key: Key, place: StatePlace) -> None:
        """The state behind a unit has been written to a place that was taken for it, unless there is one already."""
        if key in self._places:
            self.release(place)
        else:
            self._being_written.remove(place)
            self._places[key] = place

    def release(self, place: StatePlace) -> None:
        """Give back a place that was taken, and into which nobody has written."""
        self._being_written.remove(place)
        self._free.append(place)

    def announce(self, keys: Collection[Key]) -> None:
        """Somebody will leave the states behind these units."""
        self._announced.update(keys)

    def withdraw(self, keys: Collection[Key]) -> None:
        """Somebody who would leave these states has done so, or never will."""
        self._announced.subtract(keys)
        for key in keys:
            if not self._announced[key]:
                del self._announced[key]

    def check_integrity(self, announced: Mapping[Key, int]) -> None:
        """Every place is free, being written or holds one state. ValueError names what is lost, or awaited in vain.

        `announced`: by how many each state is going to be left.
        """
        num_ranks, num_slots, first = self._size
        wanted = Counter(StatePlace(rank, first + slot) for rank in range(num_ranks) for slot in range(num_slots))
        found = Counter([*self._free, *self._being_written, *self._places.values()])
        if found != wanted:
            raise ValueError(f"state cache is inconsistent: {(wanted - found) + (found - wanted)} lost, or held twice")
        if announced != self._announced:
            raise ValueError(f"state cache is inconsistent: {len(self._announced)} states are waited for in vain")


def _last_of(keys: Sequence[Key], known: Mapping[Key, object]) -> int:
    return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in known), 0)
