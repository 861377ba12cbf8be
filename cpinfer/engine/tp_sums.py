"""Partial sums of tensor-parallel ranks on CPU, in memory that they share for as long as an engine is attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from cpinfer.comm.axis import ProcessGroupComm
from cpinfer.comm.rank_watch import timeout_s
from cpinfer.comm.shared_sum import SharedSumComm, SharedSumGroup, open_shared_sum
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.models.runner import ModelRunner


@contextmanager
def sums_in_shared_memory(runner: ModelRunner, topology: Topology, config: EngineConfig) -> Iterator[None]:
    """For the length of the block, layers that hold the tensor-parallel group sum in shared memory, where they can.

    That is AutoTP's layers, and slices of weights that cpinfer makes for a phase. Behind it they hold the group again:
    training never sums here. Sums of two ranks, as many as deterministic mode takes, have the bits that they have by
    gloo. Collective over the replica where there is something to agree on: two small gathers.
    """
    group = topology.tp.group if isinstance(topology.tp, ProcessGroupComm) else topology.tp_group
    if group is None or topology.grid.tp_size == 1 or runner.device.type != "cpu" or config.tp_all_reduce == "group":
        yield
        return
    held = [value for value in (topology.tp, topology.tp_group) if value is not None and runner.holds(value)]
    shared = open_shared_sum(
        topology.replica,
        topology.replica_ranks,
        topology.grid.tp_size,
        partial(timeout_s, group),
        None if held else "no layer of this model holds the group that it sums over",
    )
    log = topology.logger(__name__)
    if isinstance(shared, str):
        log.shared("tensor-parallel ranks sum by their process group, not in shared memory: %s", shared)
        yield
        return
    log.shared("tensor-parallel ranks sum in shared memory")
    with ExitStack() as stack:
        stack.callback(shared.close)
        for value in held:
            other = SharedSumComm(topology.tp, shared) if value is topology.tp else SharedSumGroup(group, shared)
            stack.enter_context(runner.exchanging(value, other))
        yield
