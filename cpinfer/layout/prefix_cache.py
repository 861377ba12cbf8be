"""KV that outlives its sequence: prefixes of past sequences, found again by their tokens.

A block holds tokens that interleaving took from all over a stretch of the sequence, so what can be shared is a *unit*:
the smallest run of tokens whose blocks hold these tokens and no others on every shard (`KVSharding.prefix_unit`). A
unit is known by a hash of its tokens chained to the hash of the unit before it, so equal keys mean equal prefixes.

The cache holds a reference of its own to each block of a unit. Units are evicted least recently used first; a use
counts for the units before it too, so those that follow go before them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from cpinfer.layout.pool import BlockPool
from cpinfer.layout.shards import KVSharding

Key = bytes


class PrefixCache:
    """Units of one home's pool, by key. `enabled=False` finds nothing and keeps nothing."""

    def __init__(self, pool: BlockPool, sharding: KVSharding, *, enabled: bool = True) -> None:
        self._pool = pool
        self._unit = sharding.prefix_unit
        self._blocks_per_unit = sharding.prefix_unit // (sharding.num_shards * sharding.block_size)
        self._enabled = enabled
        # In order of use, the least recent first (dicts keep insertion order).
        self._units: dict[Key, list[int]] = {}
        # References to each block that are the cache's. Samples share blocks of a prompt up to the last whole block,
        # not the last whole unit, so units that begin alike and end differently have blocks in common.
        self._held: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._units)

    def match(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Blocks of the longest known prefix of whole units within `max_tokens`, with a reference for the caller."""
        found: list[Key] = []
        if self._units:
            for key in self._keys(token_ids[:max_tokens]):
                if key not in self._units:
                    break
                found.append(key)
        blocks = [block for key in found for block in self._units[key]]
        self._pool.share(blocks)
        self._touch(found)
        return blocks

    def tokens_of(self, blocks: Sequence[int]) -> int:
        """Tokens that the blocks of whole units hold."""
        return len(blocks) // self._blocks_per_unit * self._unit

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Remember the whole units of computed `token_ids`, which lie in the first of `blocks`.

        Negative numbers stand for blocks that were given back: a unit that had one ends what can be remembered.
        """
        if not self._enabled:
            return
        keys = []
        for i, key in enumerate(self._keys(token_ids)):
            if key not in self._units:
                unit = list(blocks[i * self._blocks_per_unit : (i + 1) * self._blocks_per_unit])
                if min(unit) < 0:
                    break
                self._pool.share(unit)
                self._held.update(unit)
                self._units[key] = unit
            keys.append(key)
        self._touch(keys)

    def evict(self, num_blocks: int) -> None:
        """Give up units until `num_blocks` blocks are free in the pool, or no block is left that could be."""
        if self._pool.num_free >= num_blocks:
            return
        for key in list(self._units):
            # A unit whose every block a sequence reads would free nothing, and costs nothing to keep.
            if any(map(self._is_ours_alone, self._units[key])):
                unit = self._units.pop(key)
                self._held.subtract(unit)
                self._pool.release(unit)
                if self._pool.num_free >= num_blocks:
                    return

    def can_evict(self, num_blocks: int) -> bool:
        """Whether `evict` could free so many blocks: whether there are so many that no sequence reads.

        Asked for every block that a sequence grows by, so it looks no further than it has to.
        """
        alone = (block for unit in self._units.values() for block in unit if self._is_ours_alone(block))
        found: set[int] = set()
        while len(found) < num_blocks and (block := next(alone, None)) is not None:
            found.add(block)
        return len(found) >= num_blocks

    def clear(self) -> None:
        """Forget everything: the weights that computed it are no longer the model's."""
        for unit in self._units.values():
            self._pool.release(unit)
        self._units.clear()
        self._held.clear()

    def references(self) -> Iterator[int]:
        """Every block the cache refers to, for the pool's integrity check."""
        for unit in self._units.values():
            yield from unit

    def _is_ours_alone(self, block: int) -> bool:
        return self._pool.refs(block) == self._held[block]

    def _touch(self, keys: Sequence[Key]) -> None:
        # Backwards: a unit is used by all that follow it, so it must be the last of them to go.
        for key in reversed(keys):
            self._units[key] = self._units.pop(key)

    def _keys(self, token_ids: Sequence[int]) -> Iterator[Key]:
        """The key of each whole unit."""
        key = b""
        for end in range(self._unit, len(token_ids) + 1, self._unit):
            tokens = np.asarray(token_ids[end - self._unit : end], dtype=np.int64)
            key = hashlib.blake2b(key + tokens.tobytes(), digest_size=16).digest()
            yield key
