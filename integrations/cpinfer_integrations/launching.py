"""A model and the topology around it, for tools that hold neither yet: what a config asks for, whoever shards it."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from cpinfer.comm.bootstrap import end_process, world_size_error
from cpinfer.comm.topology import Topology
from cpinfer.config import LaunchConfig, ParallelConfig
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_model, load_partly
from cpinfer.models.stored_tensors import OnRead
from cpinfer.packages import need_package


def grid_for(config: ParallelConfig, world_size: int) -> RankGrid:
    """The grid a config asks for, dp filling the world where it is left open. UserError when the world does not fit."""
    per_replica = config.tp_size * config.pcp_size
    dp_is_free = config.data_parallel_size is None
    error = world_size_error(world_size, per_replica * (config.data_parallel_size or 1), dp_is_free)
    if error:
        raise UserError(error)
    return RankGrid(config.tp_size, config.pcp_size, config.dcp_size, world_size // per_replica)


def check_packages(config: ParallelConfig) -> None:
    """UserError when the package that would shard the config's model is not installed. Nothing is imported."""
    if config.tp_size > 1 and config.tensor_parallel.provider == "autotp":
        need_package("deepspeed", f'tp_size={config.tp_size} with the provider "autotp"')


def launch_inference(
    config: LaunchConfig, grid: RankGrid, device: torch.device, on_read: OnRead | None = None
) -> tuple[Any, Topology]:
    """The config's model on `device`, its weights sharded by the config's provider when there is tensor parallelism.

    Each rank reads what it keeps, and `on_read` is told of it. The default process group must exist and span the grid.
    The process is a tool's, and ends where ranks that it waits for do not come. Collective over all ranks.
    """
    model, topology = _launched(config, grid, device, on_read)
    return model, topology.ending(partial(end_process, topology.rank))


def _launched(
    config: LaunchConfig, grid: RankGrid, device: torch.device, on_read: OnRead | None
) -> tuple[Any, Topology]:
    assert config.model is not None, "who calls has checked that a model is named"
    dtype = getattr(torch, config.dtype)
    if grid.tp_size == 1:
        # By accelerate, where it is, tensor by tensor as they are read; else once all are.
        options = {"device_map": {"": device}} if device.type != "cpu" and find_spec("accelerate") else {}
        return load_model(config.model, dtype, on_read=on_read, **options).to(device), Topology.from_world(grid)
    # A neighbour is imported by those alone who shard with it.
    if config.tensor_parallel.provider == "transformers":
        from cpinfer_integrations import transformers as by_transformers

        sharded = by_transformers.launch_inference(config.model, grid, dtype=dtype, on_read=on_read)
        return sharded.module, sharded.topology
    from cpinfer_integrations import deepspeed as by_deepspeed

    partly = load_partly(config.model, dtype, on_read=on_read)
    launched = by_deepspeed.launch_inference(partly, grid, dtype=dtype)
    return launched.module, launched.topology
