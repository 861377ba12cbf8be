"""Ranks as threads of one process: the same collectives by shared memory, so that wide grids are cheap to test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from cpinfer.comm.axis import AxisComm, SoloComm
from cpinfer.comm.topology import Topology
from cpinfer.errors import PeerLostError
from cpinfer.layout.grid import Group, RankGrid

T = TypeVar("T")


class _Meeting:
    """Where the ranks of one group lay down what they give and pick up what others gave."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.table: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)

    def exchange(self, index: int, x: Tensor) -> list[Tensor]:
        try:
            self.table[index] = x
            self.barrier.wait()
            given = [x for x in self.table if x is not None]
            # Nobody may lay down the next tensor before everyone has picked up these.
            self.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise PeerLostError("another rank ended, or never came to this collective") from error
        return given


class ThreadComm:
    """One rank's view of a group of threads."""

    def __init__(self, meeting: _Meeting, size: int, index: int) -> None:
        self._meeting = meeting
        self.size = size
        self.index = index

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        # Copied before the meeting: a real send buffer may be reused as soon as the call returns, so may ours.
        return torch.stack(self._meeting.exchange(self.index, x.clone()), out=out)

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.stack([given[self.index] for given in self._meeting.exchange(self.index, x.clone())])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.all_to_all(x).sum(dim=0)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_gather(x).sum(dim=0)


def run_ranks(grid: RankGrid, body: Callable[[Topology], T], timeout_s: float = 60.0) -> list[T]:
    """Run `body(topology)` as every rank of `grid`, each in a thread of its own; the results in rank order.

    The first rank that fails breaks all meetings, so that no other waits for it, and its error is raised.
    """
    meetings: dict[Group, _Meeting] = {}
    for group in grid.pcp_groups + grid.dcp_groups + grid.replica_groups + grid.tp_groups:
        meetings.setdefault(group, _Meeting(len(group), timeout_s))

    def comm(groups: Sequence[Group], rank: int) -> AxisComm:
        group = next(g for g in groups if rank in g)
        return ThreadComm(meetings[group], len(group), group.index(rank)) if len(group) > 1 else SoloComm()

    def run(rank: int) -> T:
        topology = Topology(
            grid,
            rank,
            comm(grid.pcp_groups, rank),
            comm(grid.dcp_groups, rank),
            comm(grid.replica_groups, rank),
            tp=comm(grid.tp_groups, rank),
        )
        try:
            return body(topology)
        except BaseException:
            for meeting in meetings.values():
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(grid.world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(grid.world_size)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, PeerLostError)):
        raise error
    return [future.result() for future in futures]
