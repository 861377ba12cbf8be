"""Prefix caching: KV that outlives its sequence, found again by the tokens of later ones.

A block holds tokens that interleaving took from all over a stretch of the sequence, so what can be shared is a *unit*:
the smallest run of tokens whose blocks hold these tokens and no others on every shard (`KVSharding.prefix_unit`). A
unit is known by a hash of its tokens chained to the hash of the unit before it, so equal keys mean equal prefixes.

Beside its blocks a unit may have what is known of the experts that its tokens went through: who asks for them finds no
other units.

The cache holds a reference of its own to each block of a unit; a block that nobody else refers to is *idle*. Units
that have one are evicted, least recently used first; a use counts for the units before it too, so those that follow go
before them. Which blocks are idle is known at any time and never looked for: `note_release` is told of all that
sequences give back.

Units that are being computed are known too, to whom it is worth to wait for them: `announce` and `withdraw`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import takewhile

import numpy as np

from cpinfer.kv_cache.block_pool import BlockPool
from cpinfer.kv_cache.expert_record import ExpertRecord, Experts
from cpinfer.layout.shards import KVSharding

Key = bytes


def extend_keys(keys: list[Key], token_ids: Sequence[int], unit: int) -> None:
    """Append the keys of the whole units of `token_ids` that are not there: the first ones are, as far as they go."""
    key = keys[-1] if keys else b""
    for end in range((len(keys) + 1) * unit, len(token_ids) + 1, unit):
        tokens = np.asarray(token_ids[end - unit : end], dtype=np.int64)
        key = hashlib.blake2b(key + tokens.tobytes(), digest_size=16).digest()
        keys.append(key)


@dataclass
class _Unit:
    """Blocks of a unit, when it was last used, and of which use it stands in the queue of those to be evicted.

    `experts`: a row for each of its tokens, where they are known.
    """

    blocks: list[int]
    last_use: int = 0
    queued_use: int = 0
    experts: Experts | None = None


class PrefixCache:
    """Units of one home's pool, by key. `keys` of a sequence are those of its whole units, as `extend_keys` has them.

    `is_enabled=False` finds nothing and keeps nothing.
    """

    def __init__(self, pool: BlockPool, sharding: KVSharding, *, is_enabled: bool = True) -> None:
        self._pool = pool
        self._unit = sharding.prefix_unit
        self._blocks_per_unit = sharding.prefix_unit // (sharding.num_shards * sharding.block_size)
        self.is_enabled = is_enabled
        self._units: dict[Key, _Unit] = {}
        self._announced: Counter[Key] = Counter()
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

    def num_known(self, keys: Sequence[Key], experts: ExpertRecord | None = None) -> int:
        """How many of the first units are here.

        Who asks for experts finds no unit of whose tokens neither `experts` nor the unit knows them.
        """
        num_known = sum(1 for _ in takewhile(self._units.__contains__, keys))
        if experts is None:
            return num_known
        num_told = experts.num_tokens // self._unit
        told_here = takewhile(lambda key: self._units[key].experts is not None, keys[num_told:num_known])
        return min(num_known, num_told + sum(1 for _ in told_here))

    def num_coming(self, keys: Sequence[Key]) -> int:
        """How many of the first units are being computed."""
        return sum(1 for _ in takewhile(self._announced.__contains__, keys))

    def num_begun(self, keys: Sequence[Key]) -> int:
        """How many of the first units are here, or being computed."""
        return sum(1 for _ in takewhile(lambda key: key in self._units or key in self._announced, keys))

    def match(self, keys: Sequence[Key]) -> list[int]:
        """Blocks of the first units as far as they are here, with a reference for the caller."""
        found = list(takewhile(self._units.__contains__, keys))
        blocks = [block for key in found for block in self._units[key].blocks]
        self._pool.share(blocks)
        self._idle_blocks.difference_update(blocks)
        self._touch(found)
        return blocks

    def announce(self, keys: Sequence[Key]) -> None:
        """Somebody computes these units now."""
        if self.is_enabled:
            self._announced.update(keys)

    def withdraw(self, keys: Sequence[Key]) -> None:
        """Somebody who computed these units does no longer: all are remembered, or never will be."""
        if self.is_enabled:
            self._announced.subtract(keys)
            for key in keys:
                if not self._announced[key]:
                    del self._announced[key]

    def note_release(self, blocks: Sequence[int]) -> None:
        """Take note that sequences have given `blocks` back to the pool."""
        for block in blocks:
            keys = self._units_of.get(block, ())
            if keys and self._pool.refs(block) == len(keys):
                self._idle_blocks.add(block)
                for key in keys:
                    self._enqueue(key)

    def recall(self, keys: Sequence[Key], experts: ExpertRecord | None) -> None:
        """Tell who asks for experts those of units that it has matched."""
        if experts is None:
            return
        for i, key in enumerate(keys):
            found = self._units[key].experts
            if found is not None and (i + 1) * self._unit > experts.num_tokens:
                experts.add(i * self._unit, found)

    def insert(self, keys: Sequence[Key], blocks: Sequence[int], experts: ExpertRecord | None = None) -> None:
        """Remember computed units, which lie in the first of `blocks`, with their `experts`.

        Negative numbers stand for blocks that were given back: a unit that had one ends what can be remembered.
        """
        if not self.is_enabled:
            return
        known, told = [], None if experts is None else experts.array()
        for i, key in enumerate(keys):
            if key not in self._units:
                unit = list(blocks[i * self._blocks_per_unit : (i + 1) * self._blocks_per_unit])
                if min(unit) < 0:
                    break
                self._pool.share(unit)
                self._units[key] = _Unit(unit)
                for block in unit:
                    self._units_of[block] = (*self._units_of.get(block, ()), key)
            if told is not None and self._units[key].experts is None and len(told) >= (i + 1) * self._unit:
                self._units[key].experts = told[i * self._unit : (i + 1) * self._unit].copy()
            known.append(key)
        self._touch(known)

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

    def can_evict(self, num_blocks: int, beside: Sequence[Key] = ()) -> bool:
        """Whether `evict` could free so many blocks: whether so many are idle, those of units `beside` not counted."""
        missing = num_blocks - len(self._idle_blocks)
        if missing > 0 or not beside:
            return missing <= 0
        theirs = (block for key in beside for block in self._units[key].blocks)
        return missing + len(self._idle_blocks.intersection(theirs)) <= 0

    def check_integrity(self, announced: Mapping[Key, int]) -> None:
        """What is known to be idle is idle, and to be coming is coming: ValueError says where not.

        `announced`: by how many each unit is computed now.
        """
        if self.is_enabled and announced != self._announced:
            raise ValueError(f"prefix cache is inconsistent: {len(self._announced)} units are waited for in vain")
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
