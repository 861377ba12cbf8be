"""By what ranks exchange on CPU: memory that they share for as long as an engine is attached, or process groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from cpinfer.comm.axis import ProcessGroupComm
from cpinfer.comm.rank_watch import timeout_s
from cpinfer.comm.segments import SharingAxis, open_segments
from cpinfer.comm.shared_memory import SharedMemory, SharedMemoryComm, SharedMemoryGroup
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.models.runner import ModelRunner

# Axes of a topology on which an engine exchanges, and those of its groups.
_AXES = {"replica": "replica_groups", "pcp": "pcp_groups", "dcp": "dcp_groups"}
_TP = "tp"


@contextmanager
def collectives_in_shared_memory(runner: ModelRunner, topology: Topology, config: EngineConfig) -> Iterator[Topology]:
    """A topology whose axes exchange in shared memory for the length of the block, where they can.

    So do layers that hold the tensor-parallel group: AutoTP's, and slices of weights that cpinfer makes for a phase.
    Behind the block they hold the group again: training never sums here. Sums of two ranks, as many as deterministic
    mode takes, have the bits that they have by gloo. Collective over the replica where there is something to agree on:
    two small gathers.
    """
    axes = {} if runner.device.type != "cpu" or config.collectives == "group" else _sharing_axes(topology)
    tp_values = [value for value in (topology.tp, topology.tp_group) if value is not None and runner.holds(value)]
    if _TP in axes and not tp_values:
        axes[_TP] = dataclasses.replace(axes[_TP], why_not="no layer of this model holds the group that it sums over")
    if not axes:
        yield topology
        return
    parts = open_segments(topology.replica, topology.replica_ranks, axes)
    shared = {name: part for name, part in parts.items() if isinstance(part, SharedMemory)}
    log = topology.logger(__name__)
    if shared:
        log.shared("ranks exchange in shared memory along %s", ", ".join(shared))
    for why in dict.fromkeys(part for part in parts.values() if isinstance(part, str)):
        names = ", ".join(name for name, part in parts.items() if part == why)
        log.shared("along %s ranks exchange by their process group, not in shared memory: %s", names, why)
    with ExitStack() as stack:
        for part in shared.values():
            stack.callback(part.close)
        for value in tp_values if _TP in shared else ():
            stack.enter_context(runner.exchanging(value, _stand_in(value, shared[_TP])))
        comms = {name: _stand_in(getattr(topology, name), shared[name]) for name in _AXES if name in shared}
        yield dataclasses.replace(topology, **comms)


def _sharing_axes(topology: Topology) -> dict[str, SharingAxis]:
    """The axes of this replica that have more than one rank, each a process of its own."""
    groups = {name: getattr(topology.grid, attribute) for name, attribute in _AXES.items()}
    comms = {name: getattr(topology, name) for name in _AXES}
    held = {name: comm.group for name, comm in comms.items() if isinstance(comm, ProcessGroupComm)}
    if topology.grid.tp_size > 1:
        held[_TP] = topology.tp.group if isinstance(topology.tp, ProcessGroupComm) else topology.tp_group
        groups[_TP] = topology.grid.tp_groups
    mine = set(topology.replica_ranks)
    return {
        name: SharingAxis([ranks for ranks in groups[name] if mine.issuperset(ranks)], partial(timeout_s, group))
        for name, group in held.items()
        if group is not None
    }


def _stand_in(value: Any, shared: SharedMemory) -> Any:
    """What exchanges in shared memory in the place of an axis, or of a process group."""
    is_axis = isinstance(value, ProcessGroupComm)
    return SharedMemoryComm(value, shared) if is_axis else SharedMemoryGroup(value, shared)
