"""Accelerate: a topology from an `Accelerator`, or from a device mesh such as its `ParallelismConfig` builds.

The mesh's axes run in the order `dp_replicate, dp_shard, cp, sp, tp`, which is the order of our grid. Ranks along
`cp` and `sp` see parts of one sequence while training, so they are the pcp axis; where there are none, data-parallel
ranks are lent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from cpinfer.comm.topology import Topology
from cpinfer.layout.grid import RankGrid
from cpinfer.packages import named

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["topology_from", "topology_from_mesh"]

_SEQUENCE_AXES = ("cp", "sp")


def topology_from(accelerator: Accelerator, *, pcp_size: int | None = None, dcp_size: int | None = None) -> Topology:
    """The topology of an Accelerate job: from its device mesh; without one, all ranks are lent to prefill. Collective.

    Args:
        accelerator: the job's.
        pcp_size: ranks that share a prefill; default: the mesh's `cp` axis, else all data-parallel
            ranks. A smaller one leaves the rest as dp replicas.
        dcp_size: KV shards of a sequence; default: `pcp_size`.

    Returns:
        This rank's topology.

    Raises:
        ValueError: for a `pcp_size` that does not fit, and for a job whose tensor parallelism is DeepSpeed's, whose
            groups Accelerate does not know.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharding = {} if plugin is None else plugin.deepspeed_config.get("tensor_parallel", {})
    if sharding.get("autotp_size", 1) > 1:
        raise ValueError(
            f"DeepSpeed shards this job's model (autotp_size={sharding['autotp_size']}), which Accelerate's mesh does "
            "not show; call cpinfer_integrations.deepspeed.topology_from with the model that prepare() returned"
        )
    mesh = accelerator.torch_device_mesh
    if mesh is not None:
        return topology_from_mesh(mesh, pcp_size=pcp_size, dcp_size=dcp_size)
    return Topology.from_world(RankGrid.lending(1, accelerator.num_processes, pcp_size, dcp_size))


def topology_from_mesh(mesh: Any, *, pcp_size: int | None = None, dcp_size: int | None = None) -> Topology:
    """The topology of a `DeviceMesh`, whose groups are used as they are. Collective.

    Args:
        mesh: over all ranks, its axes named as Accelerate names them.
        pcp_size: ranks that share a prefill; default: the mesh's `cp` axis, else all data-parallel
            ranks. A smaller one leaves the rest as dp replicas.
        dcp_size: KV shards of a sequence; default: `pcp_size`.

    Returns:
        This rank's topology.

    Raises:
        ValueError: when the mesh leaves ranks out, or does not count them with `tp` fastest.
    """
    ranks = mesh.mesh.flatten().tolist()
    world_size = dist.get_world_size()
    names = mesh.mesh_dim_names or ()
    if ranks != list(range(world_size)) or "tp" in names[:-1]:
        raise ValueError(
            f"the device mesh has axes {list(names)} over ranks {ranks}; all {world_size} ranks in order, "
            "with tp as the last axis, were wanted"
        )
    sizes = dict(zip(names, mesh.shape, strict=True))
    tp_size = sizes.get("tp", 1)
    if pcp_size is None and (sequence_size := math.prod(sizes.get(axis, 1) for axis in _SEQUENCE_AXES)) > 1:
        pcp_size = sequence_size
    grid = RankGrid.lending(tp_size, world_size // tp_size, pcp_size, dcp_size)
    tp_group = mesh["tp"].get_group() if "tp" in names else None
    return Topology.from_world(grid, tp_group=tp_group, lent=list(_groups(mesh)))


def _groups(mesh: Any) -> Iterator[dist.ProcessGroup]:
    """The groups of all axes of a mesh, and of the data-parallel axes together where Accelerate has flattened them."""
    names = mesh.mesh_dim_names
    for axis in names:
        yield mesh[axis].get_group()
    if {"dp_replicate", "dp_shard"} <= set(names):
        with suppress(KeyError):  # a mesh that Accelerate did not build need not have it
            yield mesh["dp"].get_group()
