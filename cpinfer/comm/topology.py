"""The topology: a rank's place in the grid, with a communicator along every axis. A value that is passed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from cpinfer.comm.axis import AxisComm, ProcessGroupComm, SoloComm
from cpinfer.comm.rank_watch import NoWatch, RankWatch, Watch
from cpinfer.errors import RanksDifferError, RanksMissingError
from cpinfer.layout.grid import Coords, Group, RankGrid
from cpinfer.logs import RankLogger


@dataclass(frozen=True)
class Topology:
    """What a rank needs to know of the others.

    Attributes:
        grid: sizes of the axes.
        rank: this rank, of the world.
        pcp: the ranks that share a prefill.
        dcp: the KV shards of a sequence, in shard order.
        replica: the (pcp, tp) ranks of this dp replica in rank order, which agree on every step.
        tp_group: the framework's own object, None where no framework shards weights; cpinfer hands it on and never
            communicates on it.
        owned_groups: process groups that were made here, and end with `close`.
        tp: the tp axis where cpinfer slices the weights itself, for a phase.
        watch: notices when ranks of this replica do not come.
        measured: what engines have found out about these ranks together, by what of; kept as long as the topology is.
    """

    grid: RankGrid
    rank: int
    pcp: AxisComm
    dcp: AxisComm
    replica: AxisComm
    tp_group: Any = None
    owned_groups: tuple[Any, ...] = ()
    tp: AxisComm = SoloComm()
    watch: Watch = NoWatch()
    measured: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def single(cls) -> Topology:
        """One process, no parallelism."""
        return cls(RankGrid(), 0, SoloComm(), SoloComm(), SoloComm())

    @classmethod
    def from_world(
        cls,
        grid: RankGrid,
        *,
        tp_group: dist.ProcessGroup | None = None,
        lent: Sequence[dist.ProcessGroup] = (),
        slices_weights: bool = False,
    ) -> Topology:
        """Carve the groups of `grid` out of the initialised default process group. Collective over all ranks.

        Args:
            grid: sizes of the axes, the same on every rank.
            tp_group: the job's own tensor-parallel group.
            lent: more groups of the job, of the same kinds on each rank. One with the ranks that an axis needs is used
                as it is; only what is missing is created.
            slices_weights: whether the tp axis is one that cpinfer communicates on.

        Returns:
            This rank's topology; `close` it to destroy what was created.

        Raises:
            ValueError: when the world or the tp group does not fit the grid.
            RanksDifferError: on every rank, when ranks bring different grids: they would create different groups, and
                wait.
        """
        _check_same_grid(grid)
        if grid.world_size == 1:
            return dataclasses.replace(cls.single(), tp_group=tp_group)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size != grid.world_size:
            raise ValueError(
                f"{world_size} processes were started, the grid has {grid.world_size} ranks (dp x pcp x tp). Start as "
                "many, as with torchrun --nproc-per-node, or make a grid of those that there are."
            )
        rank = dist.get_rank()
        existing: dict[frozenset[int], Any] = {frozenset(range(world_size)): dist.group.WORLD}
        for group in (*lent, *([tp_group] if tp_group is not None else [])):
            existing[frozenset(dist.get_process_group_ranks(group))] = group
        own_tp = _own(grid.tp_groups, rank)
        if tp_group is not None and set(dist.get_process_group_ranks(tp_group)) != set(own_tp):
            raise ValueError(
                f"rank {rank}: the job's tensor-parallel group has ranks {dist.get_process_group_ranks(tp_group)}, "
                f"the grid puts it with {list(own_tp)}; tp must run fastest over consecutive ranks"
            )
        owned: list[Any] = []

        def comm(groups: tuple[Group, ...]) -> AxisComm:
            mine = _own(groups, rank)
            if len(mine) == 1:
                return SoloComm()
            if frozenset(mine) not in existing:
                _create(groups, existing, owned, rank)
            return ProcessGroupComm(existing[frozenset(mine)], mine, rank)

        pcp, dcp, replica = comm(grid.pcp_groups), comm(grid.dcp_groups), comm(grid.replica_groups)
        tp = comm(grid.tp_groups) if slices_weights else SoloComm()
        ranks = _own(grid.replica_groups, rank)
        watch = RankWatch(rank, ranks, "replica") if len(ranks) > 1 else NoWatch()
        return cls(grid, rank, pcp, dcp, replica, tp_group, tuple(owned), tp, watch)

    @property
    def coords(self) -> Coords:
        return self.grid.coords(self.rank)

    @property
    def replica_ranks(self) -> Group:
        """The ranks of this dp replica, in the order of their places along `replica`."""
        return _own(self.grid.replica_groups, self.rank)

    @property
    def kv_shard(self) -> int:
        return self.dcp.index

    def logger(self, name: str) -> RankLogger:
        """The logger of this name on this rank; for its replica the first rank speaks.

        Args:
            name: of the module that logs.

        Returns:
            A logger whose records name the rank.
        """
        return RankLogger(name, self.rank, self.grid.world_size, speaks=self.is_writer)

    @property
    def is_writer(self) -> bool:
        """Whether this rank speaks for its dp replica."""
        return self.replica.index == 0

    def unsharded(self) -> Topology:
        """The same ranks with dcp=1: each pcp rank is a home of its own, and no KV is sharded.

        Returns:
            A topology beside this one, which owns no groups.
        """
        grid = dataclasses.replace(self.grid, dcp_size=1)
        return dataclasses.replace(self, grid=grid, dcp=SoloComm(), owned_groups=())

    def owning(self, groups: Sequence[Any]) -> Topology:
        """The same topology, which also destroys some groups when it closes.

        Args:
            groups: process groups that nobody else destroys.

        Returns:
            A topology beside this one, which should then not be closed as well.
        """
        return dataclasses.replace(self, owned_groups=(*self.owned_groups, *groups))

    def ending(self, end: Callable[[RanksMissingError], object]) -> Topology:
        """The same topology, of a process that may end where ranks do not come and nothing raises.

        Args:
            end: called then, in another thread, with what would be raised.

        Returns:
            A topology in place of this one, on the same groups.
        """
        if self.replica.size == 1:
            return self
        return dataclasses.replace(self, watch=RankWatch(self.rank, self.replica_ranks, "replica", end))

    def close(self) -> None:
        """Destroy the groups made here; the job's own are left alone."""
        for group in self.owned_groups:
            dist.destroy_process_group(group)


def _check_same_grid(grid: RankGrid) -> None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    grids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(grids, dataclasses.asdict(grid))
    for rank, other in enumerate(grids):
        for name, value in other.items():
            if value != grids[0][name]:
                raise RanksDifferError(
                    f"rank {rank} has {name} {value}, rank 0 has {grids[0][name]}. All ranks of a job share one "
                    "layout: give them the same config."
                )


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A process group of these ranks that waits for them as long as the default group does. Collective over all ranks.

    torch would give it a timeout of its own, whatever the job has asked for.
    """
    world: Any = dist.group.WORLD
    backend = world._get_backend(world._device_types[0])  # all of them have the same
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout)
    return group


def _own(groups: Sequence[Group], rank: int) -> Group:
    return next(group for group in groups if rank in group)


def _create(groups: tuple[Group, ...], existing: dict[frozenset[int], Any], owned: list[Any], rank: int) -> None:
    """Create every group of an axis: `new_group` is collective over the world, so all ranks create all of them."""
    for ranks in groups:
        group = new_group(ranks)
        if rank in ranks:
            existing[frozenset(ranks)] = group
            owned.append(group)
