"""What a training job lends to rollouts, whatever wraps its model: DeepSpeed's engine, DDP, FSDP2, or nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from cpinfer.colocate.phase import Lent
from cpinfer.comm.topology import Topology
from cpinfer.config import ConfigLike, JobConfig, job_config
from cpinfer.layout.grid import RankGrid
from cpinfer.models.wrappers import without_replication
from cpinfer.refusals import refuse
from cpinfer_integrations import fsdp

__all__ = ["lend"]


def lend(trained: Any, config: ConfigLike = None) -> Lent:
    """The model, ranks and weights of a job, from what its training loop calls forward on. Collective.

    Args:
        trained: a DeepSpeed engine, a model under `DistributedDataParallel`, one on which FSDP2's `fully_shard` was
            called, one that Transformers shards by tensor parallelism, or a bare model; any of them compiled, and so is
            what an Accelerator's `prepare` makes of one.
        config: the layout, and under `rollout` how weights are gathered that the trainer has sharded: a `JobConfig`, a
            dict of its keys, the path of a JSON file, or nothing.

    Returns:
        What `rollout_phase` takes.

    Raises:
        UserError: when the config's sizes do not fit the job.
        UnsupportedError: for what the table of refusals names.
    """
    config = job_config(config)
    module = without_replication(trained)
    if type(module).__module__.startswith("deepspeed."):
        from cpinfer_integrations import deepspeed as by_deepspeed

        return by_deepspeed.lend(module, config)
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise refuse("fsdp1", f"a {type(module).__name__}")
    gather = config.rollout.gather
    if fsdp.sharded_modules(module):
        return _lend_fsdp(module, config)
    if gather == "tp_shards":
        raise refuse("tp_shards_owner", f"a {type(trained).__name__}")
    if "tp" in fsdp.mesh_axes(module):
        from cpinfer_integrations import transformers as by_transformers

        return by_transformers.lend(module, config)
    return Lent(module, Topology.from_world(_grid(config)))


def _lend_fsdp(module: Any, config: JobConfig) -> Lent:
    grid, gather = _grid(config), config.rollout.gather
    fsdp.refuse_unsupported(module, gather)
    if gather == "layerwise" and grid.dp_size > 1:
        raise refuse("layerwise_replicas", f"{grid.dp_size} replicas")
    weights = fsdp.full if gather == "full" else fsdp.layerwise
    return Lent(module, Topology.from_world(grid), partial(weights, module), gather)


def _grid(config: JobConfig) -> RankGrid:
    num_replicas = dist.get_world_size() if dist.is_initialized() else 1
    return RankGrid.lending(1, num_replicas, config.pcp_size, config.dcp_size)
