"""The ranks of a job past any engine: their grid, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from cpinfer.config import JobConfig
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid

T = TypeVar("T")


def grid_of_replicas(config: JobConfig) -> RankGrid:
    """The grid of a job whose every rank is a replica of the model for training, lent as the config says.

    UserError for sizes in it that such a job cannot have.
    """
    num_replicas = dist.get_world_size() if dist.is_initialized() else 1
    grid = RankGrid.lending(1, num_replicas, config.pcp_size, config.dcp_size)
    if config.tp_size != 1:
        raise UserError(
            f"tensor_parallel.tp_size is {config.tp_size}; every rank of this job trains a whole model, which is tp=1. "
            'Leave it out. (ZeRO-3 can serve slices of its weights: rollout.gather "tp_shards".)'
        )
    if config.data_parallel_size not in (None, grid.dp_size):
        raise UserError(
            f"data_parallel_size is {config.data_parallel_size}; {num_replicas} rank(s) with pcp={grid.pcp_size} are "
            f"dp={grid.dp_size}. Leave it out, or change prefill_context_parallel_size."
        )
    return grid


def all_gather_object(own: T) -> list[T]:
    """What each rank of the job says. Collective."""
    gathered = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = [own] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
    return gathered


def on_all_ranks(act: Callable[[], T], what: str) -> T:
    """What `act` returns; an error of one rank is one on all. Collective over the job.

    `what`: what a rank with an error could not do, in words for the others.
    """
    done: list[T] = []
    own_error: Exception | None = None
    try:
        done.append(act())
    except Exception as error:  # whatever it is, the others must not wait for this rank
        own_error = error
    complaints = all_gather_object(None if own_error is None else str(own_error) or type(own_error).__name__)
    if own_error is not None:
        raise own_error
    for rank, complaint in enumerate(complaints):
        if complaint is not None:
            raise UserError(f"rank {rank} could not {what}: {complaint}")
    return done[0]
