"""What the ranks of a job tell each other past any engine: prompts that cannot be read, counts, objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from cpinfer.errors import UserError

T = TypeVar("T")


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
