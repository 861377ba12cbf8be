"""What one token of KV costs, and the state of a sequence, and how many of both a budget holds.

>>> kv = KVLayout(num_heads=1, k_dim=128, v_dim=128)
>>> kv.bytes_per_token(num_layers=28, dtype="bfloat16")
14336
>>> pool = PoolSize.from_bytes(int(12.674468994140625 * 2**30), 14336, KVSharding(1, 16, 16))
>>> pool.capacity_tokens
949296
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpinfer.layout.shards import KVSharding

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A cache may have smaller ones than the model that fills it.
CACHE_DTYPE_BYTES = {**DTYPE_BYTES, "float8_e4m3fn": 1, "float8_e5m2": 1}

# Always float32: a state sums over the whole sequence.
STATE_BYTES = 4
_BLOCK_BITS = 40


@dataclass(frozen=True)
class KVLayout:
    """What a cache stores per token and layer: GQA and MLA are two instances of it.

    `v_is_prefix_of_k` says that V is the first `v_dim` values of K (MLA's latent), so that it costs nothing more.
    """

    num_heads: int
    k_dim: int
    v_dim: int
    v_is_prefix_of_k: bool = False

    @property
    def width(self) -> int:
        """Values of one head of one token: K, and V where it is not part of it."""
        return self.k_dim + (0 if self.v_is_prefix_of_k else self.v_dim)

    @property
    def values_per_token(self) -> int:
        return self.num_heads * self.width

    def bytes_per_token(self, num_layers: int, dtype: str) -> int:
        """Bytes of one token on one rank that owns it, all layers; `dtype` is the cache's."""
        return num_layers * self.values_per_token * CACHE_DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class StateLayout:
    """What layers of linear attention keep of a sequence, however long it is: sizes of the gated delta rule.

    In each of `num_layers` a state `[num_v_heads, k_dim, v_dim]` in float32, and the last `num_tail` inputs of a
    convolution over `num_channels`, in the model's dtype.
    """

    num_layers: int
    num_k_heads: int
    num_v_heads: int
    k_dim: int
    v_dim: int
    conv_width: int

    @property
    def num_tail(self) -> int:
        """Inputs of the convolution that come before a token's own."""
        return self.conv_width - 1

    @property
    def channels_by_kind(self) -> tuple[int, int, int]:
        """Of queries, of keys, of values, in this order."""
        return self.num_k_heads * self.k_dim, self.num_k_heads * self.k_dim, self.num_v_heads * self.v_dim

    @property
    def num_channels(self) -> int:
        return sum(self.channels_by_kind)

    @property
    def state_values(self) -> int:
        return self.num_v_heads * self.k_dim * self.v_dim

    @property
    def map_values(self) -> int:
        """Of what a piece makes of any state before it."""
        return self.num_v_heads * self.k_dim * self.k_dim

    def divides(self, tp_size: int) -> bool:
        """Whether each of so many ranks can have whole key heads, with their value heads."""
        return self.num_k_heads % tp_size == 0

    def over(self, tp_size: int) -> StateLayout:
        """That of one of `tp_size` ranks between which heads are cut; the same where they do not divide."""
        if not self.divides(tp_size):
            return self
        return replace(self, num_k_heads=self.num_k_heads // tp_size, num_v_heads=self.num_v_heads // tp_size)

    def bytes_per_sequence(self, dtype: str) -> int:
        """Bytes of one sequence on the one rank that keeps them, all layers; `dtype` is the model's."""
        inputs = self.num_tail * self.num_channels * DTYPE_BYTES[dtype]
        return self.num_layers * (self.state_values * STATE_BYTES + inputs)


@dataclass(frozen=True)
class PoolSize:
    """A pool of `num_blocks` KV blocks on every rank of a home, and of `num_states` states of sequences, if any."""

    num_blocks: int
    sharding: KVSharding
    num_states: int = 0

    @property
    def number(self) -> int:
        """Both sizes in one whole number."""
        return self.num_states << _BLOCK_BITS | self.num_blocks

    @classmethod
    def smallest(cls, numbers: Sequence[int], sharding: KVSharding) -> PoolSize:
        """What pools of all `numbers` have room for."""
        blocks = [number & (1 << _BLOCK_BITS) - 1 for number in numbers]
        return cls(min(blocks), sharding, min(number >> _BLOCK_BITS for number in numbers))

    @classmethod
    def from_bytes(cls, num_bytes: int, bytes_per_token: int, sharding: KVSharding) -> PoolSize:
        """The largest pool within `num_bytes` per rank; 0 blocks when not even one fits."""
        return cls(num_bytes // (bytes_per_token * sharding.block_size), sharding)

    @classmethod
    def beside_states(
        cls, num_bytes: int, bytes_per_token: int, sharding: KVSharding, bytes_per_state: int, max_states: int
    ) -> PoolSize:
        """The largest pool within `num_bytes` per rank beside states of sequences, on half of these bytes at most.

        There are at most `max_states` of them, none when not even one fits.
        """
        num_states = min(max_states, num_bytes // 2 // bytes_per_state)
        pool = cls.from_bytes(num_bytes - num_states * bytes_per_state, bytes_per_token, sharding)
        return replace(pool, num_states=num_states)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the shards of one home hold together: one sequence can be that long."""
        return self.num_blocks * self.sharding.block_size * self.sharding.num_shards

    def max_concurrency(self, seq_len: int) -> float:
        """Sequences of `seq_len` tokens that fit at once, as a ratio of tokens."""
        return self.capacity_tokens / seq_len
