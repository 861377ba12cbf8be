"""What a training job lends to rollouts, whatever wraps its model: DeepSpeed's engine, DDP, or nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cpinfer.comm.topology import Topology
from cpinfer.config import Config
from cpinfer.engine.phase import Lent
from cpinfer.layout.grid import RankGrid


def lend(trained: Any, config: Config) -> Lent:
    """The model, ranks and weights of a job, from what its training loop calls forward on. Collective.

    `trained` is a DeepSpeed engine, a model under `DistributedDataParallel`, or a bare model.
    """
    if type(trained).__module__.startswith("deepspeed."):
        from cpinfer_integrations import deepspeed as by_deepspeed

        return by_deepspeed.lend(trained, config)
    module = trained.module if isinstance(trained, DistributedDataParallel) else trained
    num_replicas = dist.get_world_size() if dist.is_initialized() else 1
    return Lent(module, Topology.from_world(RankGrid.lending(1, num_replicas, config.pcp_size, config.dcp_size)))
