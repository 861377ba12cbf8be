"""Where the KV of a sequence lives: tokens are dealt to shards like cards, `interleave` at a time.

    num_shards=2, interleave=2, block_size=4        position    0 1 2 3 4 5 6 7 8 9
                                                    owner       0 0 1 1 0 0 1 1 0 0
                                                    local_index 0 1 0 1 2 3 2 3 4 5

A shard stores its tokens densely in order, in blocks; all shards of a home use the same block ids, so one block table
serves them all. Shard 0 is never shorter than another, so it decides how many blocks a sequence needs.

>>> sharding = KVSharding(num_shards=2, interleave=2, block_size=4)
>>> sharding.owner(np.arange(10)).tolist()
[0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
>>> [sharding.local_len(10, s) for s in range(2)]
[6, 4]
>>> [KVSharding(4, 8, 16).local_len(25, s) for s in range(4)]
[8, 8, 8, 1]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import overload

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class KVSharding:
    """The rule that sends a position to (shard, slot). Works for any `interleave >= 1`, also above `block_size`."""

    num_shards: int
    interleave: int
    block_size: int

    def __post_init__(self) -> None:
        for name in ("num_shards", "interleave", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def owner(self, position: IntArray) -> IntArray:
        """Shard that stores each position."""
        return (position // self.interleave) % self.num_shards

    def local_index(self, position: IntArray) -> IntArray:
        """Place of each position in its owner's dense sequence."""
        stride = self.interleave * self.num_shards
        return position // stride * self.interleave + position % self.interleave

    @overload
    def local_len(self, length: int, shard: int) -> int: ...
    @overload
    def local_len(self, length: IntArray, shard: int) -> IntArray: ...
    def local_len(self, length: int | IntArray, shard: int) -> int | IntArray:
        """How many of the first `length` positions `shard` stores: 0 for a length of 0."""
        if self.num_shards == 1:
            return length
        rounds, rest = divmod(length, self.interleave * self.num_shards)
        beyond = rest - shard * self.interleave
        if isinstance(beyond, int):  # numpy would take ten times as long for one number
            here = 0 if beyond < 0 else beyond if beyond < self.interleave else self.interleave
            return rounds * self.interleave + here
        return rounds * self.interleave + np.minimum(np.maximum(beyond, 0), self.interleave)

    def positions(self, length: int, shard: int) -> IntArray:
        """The positions that `shard` stores of a sequence, in local order: the inverse of `local_index`."""
        local = np.arange(self.local_len(length, shard))
        rounds, rest = np.divmod(local, self.interleave)
        return (rounds * self.num_shards + shard) * self.interleave + rest

    def slots(self, block_table: IntArray, position: IntArray, shard: int) -> IntArray:
        """Row of `shard`'s flattened cache for each position; -1 for the tokens of other shards."""
        local = self.local_index(position)
        mine = self.owner(position) == shard
        # Tokens of others may lie beyond this shard's table, so look up only what is ours.
        slots = np.full(position.shape, -1, dtype=np.int64)
        block, offset = np.divmod(local[mine], self.block_size)
        slots[mine] = block_table[block] * self.block_size + offset
        return slots

    def num_blocks(self, length: int) -> int:
        """Blocks that a sequence of `length` tokens takes (from every shard, so from the pool once)."""
        return -(-self.local_len(length, 0) // self.block_size)

    def num_tokens_in(self, num_blocks: int) -> int:
        """The longest sequence that takes no more than `num_blocks`.

        >>> [KVSharding(2, 2, 4).num_tokens_in(n) for n in range(3)]
        [0, 8, 16]
        >>> [KVSharding(2, 3, 4).num_tokens_in(n) for n in range(3)]
        [0, 7, 14]
        """
        rounds, rest = divmod(num_blocks * self.block_size, self.interleave)
        return rounds * self.interleave * self.num_shards + rest

    def num_immutable_blocks(self, length: int) -> int:
        """Blocks at the front of a sequence's table that no later token will be written to, on any shard."""
        return self.local_len(length, self.num_shards - 1) // self.block_size

    def num_mutable_blocks(self, length: int) -> int:
        """The others that it takes, which samples cannot share when they fork: each takes its own."""
        return self.num_blocks(length) - self.num_immutable_blocks(length)

    def num_dead_blocks(self, length: int, window: int) -> int:
        """Blocks at the front of a sequence of `length` tokens that no later query sees, on any shard.

        Later queries see the last `window` tokens at their place, their own included, in every layer.
        """
        return self.local_len(max(0, length - window + 1), self.num_shards - 1) // self.block_size

    @cached_property
    def prefix_unit(self) -> int:
        """Smallest run of tokens whose blocks hold these tokens and no others on every shard."""
        return lcm(self.interleave, self.block_size) * self.num_shards
