"""Transformers' own tensor parallelism: a topology from a model that it sharded, or such a model for a new job.

Its weights are DTensors on a device mesh whose innermost axis is `tp`. With more ranks than tp Transformers asks for
FSDP as well (seen in 5.23); replicated by `dp_replicate_size` it shards nothing further, and its hooks only bring the
weights where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from cpinfer.colocate.phase import Lent
from cpinfer.comm.topology import Topology
from cpinfer.config import ConfigLike, job_config
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_model
from cpinfer.models.stored_tensors import OnRead
from cpinfer.refusals import refuse

__all__ = ["LaunchedModel", "launch_inference", "lend", "topology_from"]


def topology_from(model: Any, *, pcp_size: int | None = None, dcp_size: int | None = None) -> Topology:
    """The topology of a model loaded with a `DistributedConfig`: its tp group, all other ranks lent to prefill.

    Collective.

    Args:
        model: one that was loaded with `distributed_config=DistributedConfig(tp_size=...)`.
        pcp_size: ranks that share a prefill; default: all ranks beside tp.
            A smaller one leaves the rest as dp replicas.
        dcp_size: KV shards of a sequence; default: `pcp_size`.

    Returns:
        This rank's topology.

    Raises:
        ValueError: for a model whose weights no mesh with a `tp` axis holds.
    """
    tp_group = _tp_mesh(model)["tp"].get_group()
    tp_size = dist.get_world_size(tp_group)
    grid = RankGrid.lending(tp_size, dist.get_world_size() // tp_size, pcp_size, dcp_size)
    return Topology.from_world(grid, tp_group=tp_group)


def lend(model: Any, config: ConfigLike = None) -> Lent:
    """What a training job lends whose model Transformers shards: its weights in place, its tp group, all other ranks.

    Collective.

    Args:
        model: one that was loaded with `distributed_config=DistributedConfig(tp_size=...)`.
        config: the layout, as `cpinfer_integrations.lending.lend` takes it.

    Returns:
        What `rollout_phase` takes.

    Raises:
        UserError: when the config says a tp_size that is not that of the model's mesh.
        UnsupportedError: where slices of weights are wanted, which the ranks have already.
    """
    config, tp_size = job_config(config), _tp_mesh(model)["tp"].size()
    if config.rollout.gather == "tp_shards":
        raise refuse("tp_shards_owner", f"a {type(model).__name__} that Transformers shards")
    if config.tensor_parallel.tp_size not in (None, tp_size):
        raise UserError(
            f"the model's weights lie on a device mesh with tp={tp_size}, the config says tp={config.tp_size}. "
            f"Leave tensor_parallel.tp_size out, or set it to {tp_size}."
        )
    topology = topology_from(model, pcp_size=config.pcp_size, dcp_size=config.dcp_size)
    return Lent(model, topology, num_copies=tp_size)


@dataclass(frozen=True)
class LaunchedModel:
    """A model sharded by Transformers, and the topology around it.

    Attributes:
        module: the causal LM.
        topology: this rank's.
    """

    module: Any
    topology: Topology


def launch_inference(model: str, grid: RankGrid, *, dtype: torch.dtype, on_read: OnRead | None = None) -> LaunchedModel:
    """Load `model`, a folder or Hugging Face id, sharded over the tp axis of `grid`. Collective over all ranks.

    The default process group must exist and span the grid; the groups of the mesh end with it.

    Args:
        model: a folder or Hugging Face id.
        grid: the layout, of all ranks.
        dtype: of the weights.
        on_read: told of bytes as they are read.

    Returns:
        The model and its topology.
    """
    replicas = grid.world_size // grid.tp_size
    more = {"fsdp_size": 1, "dp_replicate_size": replicas} if replicas > 1 else {}
    config = DistributedConfig(tp_size=grid.tp_size, **more)
    module = load_model(model, dtype, on_read=on_read, distributed_config=config)
    return LaunchedModel(module, topology_from(module, pcp_size=grid.pcp_size, dcp_size=grid.dcp_size))


def _tp_mesh(model: Any) -> Any:
    mesh = next((m for p in model.parameters() if "tp" in _dim_names(m := getattr(p, "device_mesh", None))), None)
    if mesh is None:
        raise ValueError(
            "no weight of this model lies on a device mesh with a tp axis; load it with "
            "distributed_config=DistributedConfig(tp_size=...)"
        )
    return mesh


def _dim_names(mesh: Any) -> tuple[str, ...]:
    return () if mesh is None else mesh.mesh_dim_names or ()
