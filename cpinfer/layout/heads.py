"""Which attention heads a tensor-parallel rank computes, and when a DCP group can share their KV.

With more tp ranks than KV heads, each head is held by `rep = tp_size / num_kv_heads` neighbouring ranks:

    tp=4, 8 query heads, 2 KV heads        tp0      tp1      tp2      tp3
                                 queries   q0-1     q2-3     q4-5     q6-7
                                 KV head   k0       k0       k1       k1            rep = 2

A DCP group that spans `k` tp ranks turns these copies into shards when all `k` hold the same head, that is when
`rep % k == 0`. Otherwise it *mixes* heads: then every rank of it stores all heads of its group, for its shard.

    tp=6, 12 query heads, 2 KV heads, dcp=2        tp0     tp1     tp2     tp3     tp4     tp5
                                 queries, head     q0-1/k0 q2-3/k0 q4-5/k0 q6-7/k1 q8-9/k1 q10-11/k1
                                 stored by group   k0      k0      k0-1    k0-1    k1      k1

>>> heads = HeadPlacement(12, 2, tp_size=6)
>>> [heads.in_group(RankGrid(tp_size=6, dcp_size=2), tp_rank).kv_heads for tp_rank in (0, 2, 4)]
[(0,), (0, 1), (1,)]
"""

from __future__ import annotations

from dataclasses import dataclass

from cpinfer.layout.grid import RankGrid


@dataclass(frozen=True)
class GroupHeads:
    """The KV heads that the ranks of one DCP group store, as one of its ranks sees them.

    The group's tp ranks are its *columns*, ascending; they hold consecutive query heads, all of which meet the stored
    KV heads in decode: `q_per_kv[i]` of them belong to `kv_heads[i]`. `columns` bring the stored heads, in order: one
    column for each distinct set of heads, the others have copies. `own` are the stored heads of this rank's own
    queries. `num_q_heads` counts the queries of one rank.
    """

    num_q_heads: int
    kv_heads: tuple[int, ...]
    q_per_kv: tuple[int, ...]
    columns: tuple[int, ...]
    own: slice

    @property
    def is_mixed(self) -> bool:
        return len(self.columns) > 1


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

    def in_group(self, grid: RankGrid, tp_rank: int) -> GroupHeads:
        """What the DCP group of a rank stores."""
        k = grid.columns_per_dcp_group
        group = range(tp_rank // k * k, (tp_rank // k + 1) * k)
        columns = [c for c, t in enumerate(group) if c == 0 or self.kv_heads(t) != self.kv_heads(t - 1)]
        kv_heads = tuple(head for c in columns for head in self.kv_heads(group[c]))
        # Query heads of a rank are shared evenly by the KV heads it holds, and copies add up.
        of_each = self.q_heads_per_rank // self.kv_heads_per_rank
        first = kv_heads.index(self.kv_heads(tp_rank)[0])
        return GroupHeads(
            num_q_heads=self.q_heads_per_rank,
            kv_heads=kv_heads,
            q_per_kv=tuple(of_each * sum(head in self.kv_heads(t) for t in group) for head in kv_heads),
            columns=tuple(columns),
            own=slice(first, first + self.kv_heads_per_rank),
        )

    def max_stored_heads(self, grid: RankGrid) -> int:
        """KV heads that a rank stores, the most of all groups."""
        first_of_groups = range(0, self.tp_size, grid.columns_per_dcp_group)
        return max(len(self.in_group(grid, t).kv_heads) for t in first_of_groups)

    def mixes_heads(self, grid: RankGrid) -> bool:
        """Whether some DCP group of `grid` spans tp ranks with different KV heads."""
        columns = grid.columns_per_dcp_group
        return columns > 1 and self.rep % columns != 0


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
