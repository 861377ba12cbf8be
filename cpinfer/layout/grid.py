"""The rank grid: which coordinate every rank has, and which ranks talk to each other.

    world_size = dp x pcp x tp          rank = (dp_rank * pcp_size + pcp_rank) * tp_size + tp_rank

TP runs fastest, so a framework's tensor-parallel groups are consecutive ranks and its data-parallel replicas are the
ranks that prefill borrows. Decode context parallelism adds no ranks: it regroups the (pcp, tp) grid of one dp replica,
*pcp fastest*, into runs of `dcp_size` ranks. The place of a rank in its run is the KV shard it holds.

    TP2 PCP2 DCP4          tp0  tp1          down the columns, then right:  0, 2, 1, 3
                    pcp0 |  0    1 |         so rank 2 holds shard 1 and rank 1 holds shard 2
                    pcp1 |  2    3 |

>>> RankGrid(tp_size=2, pcp_size=2, dcp_size=4).dcp_groups
((0, 2, 1, 3),)
>>> RankGrid(tp_size=4, pcp_size=2, dcp_size=2).dcp_groups
((0, 4), (1, 5), (2, 6), (3, 7))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cpinfer.errors import UserError

Group = tuple[int, ...]


class Coords(NamedTuple):
    """Where one rank sits along each axis of the grid."""

    dp_rank: int
    pcp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class RankGrid:
    """Sizes of the axes; every group of ranks follows from them.

    Attributes:
        tp_size: ranks that share the weights of a replica.
        pcp_size: ranks that share a prefill.
        dcp_size: KV shards of a sequence; no ranks of its own.
        dp_size: independent replicas.

    Raises:
        ValueError: when `dcp_size` neither divides `pcp_size` nor is a multiple of it that divides `pcp_size *
            tp_size`; it names the sizes that would be legal.
    """

    tp_size: int = 1
    pcp_size: int = 1
    dcp_size: int = 1
    dp_size: int = 1

    def __post_init__(self) -> None:
        errors = grid_errors(self.tp_size, self.pcp_size, self.dcp_size, self.dp_size)
        if errors:
            raise ValueError(" ".join(errors))

    @classmethod
    def lending(
        cls, tp_size: int, num_replicas: int, pcp_size: int | None = None, dcp_size: int | None = None
    ) -> RankGrid:
        """The grid of a job that holds `num_replicas` of its model on `tp_size` ranks each, and lends them to prefill.

        Args:
            tp_size: ranks of one replica.
            num_replicas: data-parallel replicas of the model.
            pcp_size: ranks that share a prefill; default: all replicas. A smaller one leaves the rest as dp replicas.
            dcp_size: KV shards of a sequence; default: `pcp_size`.

        Returns:
            The grid, of `tp_size * num_replicas` ranks.

        Raises:
            ValueError: when `pcp_size` does not divide the replicas, or for sizes that no grid has.
        """
        pcp_size = pcp_size or num_replicas
        if num_replicas % pcp_size:
            raise UserError(
                f"pcp={pcp_size} does not divide the job's {num_replicas} replica(s) of the model, which would be its "
                "ranks. Lower prefill_context_parallel_size, or start more ranks."
            )
        return cls(tp_size, pcp_size, dcp_size or pcp_size, num_replicas // pcp_size)

    @property
    def world_size(self) -> int:
        return self.dp_size * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that share one scheduler: the (pcp, tp) grid of one dp rank."""
        return self.pcp_size * self.tp_size

    @property
    def num_homes(self) -> int:
        """KV replica groups: sets of pcp ranks that each hold whole sequences; above 1 only when dcp < pcp."""
        return max(1, self.pcp_size // self.dcp_size)

    @property
    def columns_per_dcp_group(self) -> int:
        """tp ranks that one DCP group spans (`k` in the rules on KV heads)."""
        return max(1, self.dcp_size // self.pcp_size)

    @property
    def row_ranks(self) -> int:
        """pcp ranks over which the decode rows of one home are dealt."""
        return min(self.pcp_size, self.dcp_size)

    @property
    def context_runs_over_pcp(self) -> bool:
        """Whether the pcp axis reaches all KV shards of a home from every rank that prefills; else the DCP axis."""
        return self.dcp_size <= self.pcp_size

    def rank(self, dp_rank: int, pcp_rank: int, tp_rank: int) -> int:
        """The global rank at a place of the grid, tp fastest.

        Args:
            dp_rank: in `[0, dp_size)`.
            pcp_rank: in `[0, pcp_size)`.
            tp_rank: in `[0, tp_size)`.

        Returns:
            A rank in `[0, world_size)`.
        """
        return (dp_rank * self.pcp_size + pcp_rank) * self.tp_size + tp_rank

    def coords(self, rank: int) -> Coords:
        """Where a rank sits along each axis.

        Args:
            rank: a global rank.

        Returns:
            Its dp, pcp and tp rank.

        Raises:
            ValueError: for a rank outside of the grid.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the grid of {self.world_size} ranks")
        outer, tp_rank = divmod(rank, self.tp_size)
        return Coords(*divmod(outer, self.pcp_size), tp_rank)

    @cached_property
    def tp_groups(self) -> tuple[Group, ...]:
        return tuple(
            tuple(self.rank(d, p, t) for t in range(self.tp_size))
            for d in range(self.dp_size)
            for p in range(self.pcp_size)
        )

    @cached_property
    def pcp_groups(self) -> tuple[Group, ...]:
        return tuple(
            tuple(self.rank(d, p, t) for p in range(self.pcp_size))
            for d in range(self.dp_size)
            for t in range(self.tp_size)
        )

    @cached_property
    def dcp_groups(self) -> tuple[Group, ...]:
        """Groups in *shard order*: a rank's place in its tuple is its KV shard, whatever order a torch group has."""
        groups = []
        for d in range(self.dp_size):
            columns = [self.rank(d, p, t) for t in range(self.tp_size) for p in range(self.pcp_size)]
            groups += [tuple(columns[i : i + self.dcp_size]) for i in range(0, len(columns), self.dcp_size)]
        return tuple(groups)

    @cached_property
    def replica_groups(self) -> tuple[Group, ...]:
        """The ranks of each dp replica, in rank order: those that must agree on every step."""
        n = self.ranks_per_replica
        return tuple(tuple(range(d * n, (d + 1) * n)) for d in range(self.dp_size))

    def kv_shard(self, rank: int) -> int:
        """The KV shard that a rank holds.

        Args:
            rank: a global rank.

        Returns:
            Its place in its DCP group's list, in `[0, dcp_size)`.
        """
        return self._dcp_place[rank]

    def home(self, rank: int) -> int:
        """The home (KV replica group) that a rank belongs to.

        Args:
            rank: a global rank.

        Returns:
            The home's number, in `[0, num_homes)`.
        """
        return self.coords(rank).pcp_rank // self.row_ranks

    @cached_property
    def _dcp_place(self) -> dict[int, int]:
        return {rank: place for group in self.dcp_groups for place, rank in enumerate(group)}


def grid_errors(tp_size: int, pcp_size: int, dcp_size: int, dp_size: int = 1) -> list[str]:
    """Sentences that say what is wrong with the sizes of a grid; empty when it is legal."""
    sizes = {"tp": tp_size, "pcp": pcp_size, "dcp": dcp_size, "dp": dp_size}
    errors = [f"{name}={size} is not a positive number of ranks." for name, size in sizes.items() if size < 1]
    if errors:
        return errors
    legal = legal_dcp_sizes(tp_size, pcp_size)
    if dcp_size not in legal:
        errors.append(
            f"dcp={dcp_size} does not fit tp={tp_size}, pcp={pcp_size}: it must divide pcp, or be a multiple of pcp "
            f"that divides pcp * tp = {pcp_size * tp_size}. Use one of {', '.join(map(str, legal))}."
        )
    return errors


def legal_dcp_sizes(tp_size: int, pcp_size: int) -> list[int]:
    """Every dcp size that the grid of one replica can be cut into, ascending.

    >>> legal_dcp_sizes(tp_size=4, pcp_size=2)
    [1, 2, 4, 8]
    """
    return sorted({*_divisors(pcp_size), *(pcp_size * k for k in _divisors(tp_size))})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
