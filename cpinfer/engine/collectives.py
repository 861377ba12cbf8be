"""By what ranks exchange on CPU: memory that they share for as long as an engine is attached, or process groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from cpinfer.comm.axis import ProcessGroupComm
from cpinfer.comm.rank_watch import timeout_s
from cpinfer.comm.segments import SharingAxis, open_segments
from cpinfer.comm.shared_memory import SharedMemory, SharedMemoryComm, SharedMemoryGroup
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.layout.grid import Group
from cpinfer.models.runner import ModelRunner

# Axes of a topology on which an engine exchanges, and those of its groups.
_AXES = {"replica": "replica_groups", "pcp": "pcp_groups", "dcp": "dcp_groups"}
_TP = "tp"


@contextmanager
def collectives_in_shared_memory(
    topology: Topology, config: EngineConfig, runner: ModelRunner | None = None
) -> Iterator[Topology]:
    """A topology whose axes exchange in shared memory for the length of the block, where they can, and may.

    So do layers of the `runner`'s model that hold the tensor-parallel group: AutoTP's, and slices of weights that
    cpinfer makes for a phase. Behind the block they hold the group again: training never sums here. Sums of two ranks,
    as many as deterministic mode takes, have the bits that they have by gloo. Collective over the replica where there
    is something to agree on: two small gathers.
    """
    may_share = config.collectives == "auto" and (runner is None or runner.device.type == "cpu")
    held = _held_tp(topology, runner) if may_share and runner is not None else None
    axes = _sharing_axes(topology, held) if may_share else {}
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
        if runner is not None and held and _TP in shared:
            for value in held:
                stand_in = SharedMemoryGroup if value is topology.tp_group else SharedMemoryComm
                stack.enter_context(runner.exchanging(value, stand_in(value, shared[_TP])))
        comms: dict[str, Any] = {
            name: SharedMemoryComm(getattr(topology, name), shared[name]) for name in _AXES if name in shared
        }
        yield dataclasses.replace(topology, **comms)


def _sharing_axes(topology: Topology, held_tp: Sequence[Any] | None) -> dict[str, SharingAxis]:
    """The axes of this replica that have more than one rank, each a process of its own; tp where layers are known."""
    mine = set(topology.replica_ranks)

    def sharing(groups: Sequence[Group], group: Any, why_not: str | None = None) -> SharingAxis:
        return SharingAxis([ranks for ranks in groups if mine.issuperset(ranks)], partial(timeout_s, group), why_not)

    axes = {}
    for name, groups in _AXES.items():
        comm = getattr(topology, name)
        if isinstance(comm, ProcessGroupComm):
            axes[name] = sharing(getattr(topology.grid, groups), comm.group)
    tp_group = topology.tp.group if isinstance(topology.tp, ProcessGroupComm) else topology.tp_group
    if held_tp is not None and tp_group is not None and topology.grid.tp_size > 1:
        why_not = None if held_tp else "no layer of this model holds the group that it sums over"
        axes[_TP] = sharing(topology.grid.tp_groups, tp_group, why_not)
    return axes


def _held_tp(topology: Topology, runner: ModelRunner) -> list[Any]:
    """By what layers of the model sum over tensor-parallel ranks."""
    values = (topology.tp, topology.tp_group) if topology.grid.tp_size > 1 else ()
    return [value for value in values if value is not None and runner.holds(value)]
