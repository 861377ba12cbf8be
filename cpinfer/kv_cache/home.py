"""The KV blocks of one home, a KV replica group: its pool, the prefixes it remembers, and places for states, if any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cpinfer.kv_cache.block_pool import BlockPool
from cpinfer.kv_cache.prefix_cache import Key, PrefixCache
from cpinfer.kv_cache.state_pool import StatePool, StateSlot
from cpinfer.layout.shards import KVSharding


class KVHome:
    """A pool whose blocks the prefix cache may keep until they are needed.

    `states`: where sequences of a model with states have theirs, one each; None where they have none.
    """

    def __init__(
        self, num_blocks: int, sharding: KVSharding, *, enable_prefix_caching: bool, states: StatePool | None = None
    ) -> None:
        self.states = states
        self.pool = BlockPool(num_blocks)
        self.prefixes = PrefixCache(self.pool, sharding, is_enabled=enable_prefix_caching)
        self._sharding = sharding
        self._enable_prefix_caching = enable_prefix_caching

    def emptied(self) -> KVHome:
        """The same home without a sequence or a cached prefix; this one is as it was."""
        states = None if self.states is None else StatePool(self.states.num_ranks, self.states.num_slots)
        return KVHome(
            self.pool.num_blocks, self._sharding, enable_prefix_caching=self._enable_prefix_caching, states=states
        )

    def has(self, n: int, beside: Sequence[Key] = (), num_states: int = 0) -> bool:
        """Whether `n` blocks are free, or would be without cached prefixes, units `beside` excepted, which are here.

        And places for so many states.
        """
        has_states = self.states is None or num_states <= self.states.num_free
        return has_states and self.prefixes.can_evict(n - self.pool.num_free, beside)

    def take_state(self) -> StateSlot | None:
        """A place for a state, None where sequences have none. ValueError when `has` does not hold."""
        return None if self.states is None else self.states.take()

    def take(self, n: int, *, room: int = 0, after: int | None = None) -> list[int]:
        """`n` blocks; cached prefixes give way. ValueError when `has(n)` does not hold."""
        self.prefixes.evict(n)
        return self.pool.allocate(n, room=room, after=after)

    def release(self, blocks: Sequence[int], state: StateSlot | None = None) -> None:
        """Give back a sequence's blocks, and its state's place; blocks of cached prefixes may now give way."""
        if self.states is not None and state is not None:
            self.states.release(state)
        self.pool.release(blocks)
        self.prefixes.note_release(blocks)

    def check_integrity(
        self, referenced: Iterable[int], announced: Mapping[Key, int], states: Iterable[StateSlot] = ()
    ) -> None:
        """`referenced` are the blocks of all sequences, `announced` the units they compute. ValueError names a leak.

        `states`: the places of their states.
        """
        if self.states is not None:
            self.states.check_integrity(states)
        self.pool.check_integrity([*referenced, *self.prefixes.references()])
        self.prefixes.check_integrity(announced)
