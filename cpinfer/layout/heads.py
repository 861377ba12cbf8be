"""Which attention heads a tensor-parallel rank computes, and when a DCP group can share their KV.

With more tp ranks than KV heads, each head is held by `rep = tp_size / num_kv_heads` neighbouring ranks:

    tp=4, 8 query heads, 2 KV heads        tp0      tp1      tp2      tp3
                                 queries   q0-1     q2-3     q4-5     q6-7
                                 KV head   k0       k0       k1       k1            rep = 2

A DCP group that spans `k` tp ranks turns these copies into shards when all `k` hold the same head, that is when
`rep % k == 0`. Otherwise it *mixes* heads, and every rank would have to store all heads of its group.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpinfer.layout.grid import RankGrid


@dataclass(frozen=True)
class HeadPlacement:
    """Query and KV heads of one model, dealt over `tp_size` ranks. ValueError when they cannot be dealt evenly."""

    num_q_heads: int
    num_kv_heads: int
    tp_size: int

    def __post_init__(self) -> None:
        errors = head_errors(self.num_q_heads, self.num_kv_heads, self.tp_size)
        if errors:
            raise ValueError(" ".join(errors))

    @property
    def rep(self) -> int:
        """tp ranks that hold a copy of each KV head."""
        return max(1, self.tp_size // self.num_kv_heads)

    @property
    def q_heads_per_rank(self) -> int:
        return self.num_q_heads // self.tp_size

    @property
    def kv_heads_per_rank(self) -> int:
        return max(1, self.num_kv_heads // self.tp_size)

    def q_heads(self, tp_rank: int) -> range:
        n = self.q_heads_per_rank
        return range(tp_rank * n, (tp_rank + 1) * n)

    def kv_heads(self, tp_rank: int) -> range:
        """Original KV heads of a rank. Expanded to `tp_size` heads, head j is a copy of original head `j // rep`."""
        first = tp_rank * self.kv_heads_per_rank // self.rep
        return range(first, first + self.kv_heads_per_rank)

    def mixes_heads(self, grid: RankGrid) -> bool:
        """Whether some DCP group of `grid` spans tp ranks with different KV heads."""
        columns = grid.columns_per_dcp_group
        return columns > 1 and self.rep % columns != 0

    def copies_per_home(self, grid: RankGrid) -> int:
        """How often each (KV head, shard) is stored in one home of an unmixed layout."""
        return self.rep // grid.columns_per_dcp_group


def head_errors(num_q_heads: int, num_kv_heads: int, tp_size: int) -> list[str]:
    """Sentences that say why heads cannot be dealt over tp ranks; empty when they can."""
    if num_q_heads < 1 or num_kv_heads < 1:
        return [f"{num_q_heads} query heads over {num_kv_heads} KV heads is not a model: both must be at least 1."]
    errors = []
    if num_q_heads % num_kv_heads:
        errors.append(f"{num_q_heads} query heads do not divide over {num_kv_heads} KV heads.")
    if num_q_heads % tp_size:
        errors.append(f"{num_q_heads} query heads do not divide over tp={tp_size}. Use a divisor of {num_q_heads}.")
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        errors.append(
            f"{num_kv_heads} KV heads do not fit tp={tp_size}: one must divide the other. "
            f"Use a tp that divides {num_kv_heads} or is a multiple of it."
        )
    return errors
