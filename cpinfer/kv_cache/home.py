"""The KV blocks of one home, a KV replica group: its pool, and the prefixes it remembers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cpinfer.kv_cache.block_pool import BlockPool
from cpinfer.kv_cache.prefix_cache import Key, PrefixCache
from cpinfer.layout.shards import KVSharding


class KVHome:
    """A pool whose blocks the prefix cache may keep until they are needed."""

    def __init__(self, num_blocks: int, sharding: KVSharding, *, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.prefixes = PrefixCache(self.pool, sharding, is_enabled=enable_prefix_caching)
        self._sharding = sharding
        self._enable_prefix_caching = enable_prefix_caching

    def emptied(self) -> KVHome:
        """The same home without a sequence or a cached prefix; this one is as it was."""
        return KVHome(self.pool.num_blocks, self._sharding, enable_prefix_caching=self._enable_prefix_caching)

    def has(self, n: int, beside: Sequence[Key] = ()) -> bool:
        """Whether `n` blocks are free, or would be without cached prefixes, units `beside` excepted, which are here."""
        return self.prefixes.can_evict(n - self.pool.num_free, beside)

    def take(self, n: int, *, room: int = 0, after: int | None = None) -> list[int]:
        """`n` blocks; cached prefixes give way. ValueError when `has(n)` does not hold."""
        self.prefixes.evict(n)
        return self.pool.allocate(n, room=room, after=after)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks; those of cached prefixes may now give way."""
        self.pool.release(blocks)
        self.prefixes.note_release(blocks)

    def check_integrity(self, referenced: Iterable[int], announced: Mapping[Key, int]) -> None:
        """`referenced` are the blocks of all sequences, `announced` the units they compute. ValueError names a leak."""
        self.pool.check_integrity([*referenced, *self.prefixes.references()])
        self.prefixes.check_integrity(announced)
