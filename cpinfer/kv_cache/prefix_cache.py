"""Prefix caching: KV that outlives its sequence, found again by the tokens of later ones.

A block holds tokens that interleaving took from all over a stretch of the sequence, so what can be shared is a *unit*:
the smallest run of tokens whose blocks hold these tokens and no others on every shard (`KVSharding.prefix_unit`). A
unit is known by a hash of its tokens chained to the hash of the unit before it, so equal keys mean equal prefixes.

The cache holds a reference of its own to each block of a unit; a block that nobody else refers to is *idle*. Units
that have one are evicted, least recently used first; a use counts for the units before it too, so those that follow go
before them. Which blocks are idle is known at any time and never looked for: `note_release` is told of all that
sequences give back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from cpinfer.kv_cache.block_pool import BlockPool
from cpinfer.layout.shards import KVSharding

Key = bytes


@dataclass
class _Unit:
    """Blocks of a unit, when it was last used, and of which use it stands in the queue of those to be evicted."""

    blocks: list[int]
    last_use: int = 0
    queued_use: int = 0


class PrefixCache:
    """Units of one home's pool, by key. `enabled=False` finds nothing and keeps nothing."""

    def __init__(self, pool: BlockPool, sharding: KVSharding, *, enabled: bool = True) -> None:
        self._pool = pool
        self._unit = sharding.prefix_unit
        self._blocks_per_unit = sharding.prefix_unit // (sharding.num_shards * sharding.block_size)
        self._enabled = enabled
        self._units: dict[Key, _Unit] = {}
        self._num_uses = 0
        self.num_evicted_units = 0
        # Samples share blocks of a prompt up to the last whole block, not the last whole unit: units that begin alike
        # and end differently have blocks in common. Each unit has a reference to each of its blocks.
        self._units_of: dict[int, tuple[Key, ...]] = {}
        # Only asked what it contains, never walked.
        self._idle_blocks: set[int] = set()
        # A heap of (last use, key): every unit with an idle block, and some that have been used since, or have none.
        self._queue: list[tuple[int, Key]] = []

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
        blocks = [block for key in found for block in self._units[key].blocks]
        self._pool.share(blocks)
        self._idle_blocks.difference_update(blocks)
        self._touch(found)
        return blocks

    def note_release(self, blocks: Sequence[int]) -> None:
        """Take note that sequences have given `blocks` back to the pool."""
        for block in blocks:
            keys = self._units_of.get(block, ())
            if keys and self._pool.refs(block) == len(keys):
                self._idle_blocks.add(block)
                for key in keys:
                    self._enqueue(key)

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
                self._units[key] = _Unit(unit)
                for block in unit:
                    self._units_of[block] = (*self._units_of.get(block, ()), key)
            keys.append(key)
        self._touch(keys)

    def evict(self, num_blocks: int) -> None:
        """Give up units until `num_blocks` blocks are free in the pool, or no block is left that could be."""
        while self._pool.num_free < num_blocks and self._queue:
            use, key = heappop(self._queue)
            unit = self._units.get(key)
            # A unit whose every block a sequence reads would free nothing, and costs nothing to keep.
            if unit is not None and unit.last_use == use:
                unit.queued_use = 0
                if not self._idle_blocks.isdisjoint(unit.blocks):
                    self._forget(key)
                    self.num_evicted_units += 1

    def can_evict(self, num_blocks: int) -> bool:
        """Whether `evict` could free so many blocks: whether there are so many that no sequence reads."""
        return len(self._idle_blocks) >= num_blocks

    def check_integrity(self) -> None:
        """What is known to be idle is what is idle. ValueError names the blocks where it is not."""
        idle = {block for block, keys in self._units_of.items() if self._pool.refs(block) == len(keys)}
        if idle != self._idle_blocks:
            raise ValueError(
                f"prefix cache is inconsistent: blocks {sorted(idle ^ self._idle_blocks)} are counted wrongly"
            )
        queue = set(self._queue)
        unlisted = [k for block in idle for k in self._units_of[block] if (self._units[k].last_use, k) not in queue]
        if unlisted:
            raise ValueError(f"prefix cache is inconsistent: {len(unlisted)} units would never be evicted")

    def references(self) -> Iterator[int]:
        """Every block the cache refers to, for the pool's integrity check."""
        for unit in self._units.values():
            yield from unit.blocks

    def _forget(self, key: Key) -> None:
        unit = self._units.pop(key)
        self._pool.release(unit.blocks)
        for block in unit.blocks:
            rest = tuple(other for other in self._units_of.pop(block) if other != key)
            if rest:
                self._units_of[block] = rest
            else:
                self._idle_blocks.discard(block)

    def _touch(self, keys: Sequence[Key]) -> None:
        # Backwards: a unit is used by all that follow it, so it must be the last of them to go.
        for key in reversed(keys):
            unit = self._units[key]
            self._num_uses += 1
            unit.last_use = self._num_uses
            if not self._idle_blocks.isdisjoint(unit.blocks):
                self._enqueue(key)

    def _enqueue(self, key: Key) -> None:
        unit = self._units[key]
        if unit.queued_use == unit.last_use:
            return
        unit.queued_use = unit.last_use
        heappush(self._queue, (unit.last_use, key))
        if len(self._queue) > 2 * len(self._units):  # most of it is old
            self._queue = [(u.last_use, k) for k, u in self._units.items() if u.queued_use == u.last_use]
            heapify(self._queue)

    def _keys(self, token_ids: Sequence[int]) -> Iterator[Key]:
        """The key of each whole unit."""
        key = b""
        for end in range(self._unit, len(token_ids) + 1, self._unit):
            tokens = np.asarray(token_ids[end - self._unit : end], dtype=np.int64)
            key = hashlib.blake2b(key + tokens.tobytes(), digest_size=16).digest()
            yield key
