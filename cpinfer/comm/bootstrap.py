"""Starting and ending the processes' common life: what the launcher said, the default group, how a rank dies.

The environment is an argument here; only tools read it.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from cpinfer.errors import EngineFaultError, OutputError, PeerLostError, StreamEndedError, UserError

Shared = TypeVar("Shared")

# How long a collective may wait for a rank that is alive but slow: a cold kernel build, a large checkpoint.
_TIMEOUT = datetime.timedelta(minutes=30)

# How long the other ranks of a failed run wait for their launcher to end them before they leave by themselves.
PEER_GRACE_S = 5.0

# Words of gloo and NCCL for "the other end is gone".
_PEER_LOSS_WORDS = (
    "closed by peer",
    "connection reset",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
)


@dataclass(frozen=True)
class Launch:
    """What a launcher (deepspeed, torchrun, accelerate) tells its processes; one process where none was used."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Launch:
        """Read RANK, LOCAL_RANK and WORLD_SIZE; UserError when one is no number."""

        def number(name: str, default: int) -> int:
            value = environ.get(name) or str(default)
            if not value.isdigit():
                raise UserError(f"the environment says {name}={value!r}; launchers set a whole number there.")
            return int(value)

        return cls(rank=number("RANK", 0), local_rank=number("LOCAL_RANK", 0), world_size=number("WORLD_SIZE", 1))

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def default_group(launch: Launch) -> Iterator[None]:
    """The default process group for the length of the block: gloo on CPU, NCCL beside it on CUDA.

    After an error it is not torn down in an orderly way, since that would wait for ranks that may wait for us.
    """
    if launch.world_size == 1:
        yield
        return
    cuda = launch.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(launch.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    yield
    # A group that outlives its destruction, in a reference cycle of anyone's, ends with the interpreter, and gloo's
    # threads then abort the process about once in ten runs.
    gc.collect()
    dist.destroy_process_group()


def first_complaint(launch: Launch, complaint: str | None) -> str | None:
    """The complaint of the lowest rank that has one, on every rank; None when nobody complains. Collective."""
    complaints: list[str | None] = [complaint]
    if launch.world_size > 1:
        complaints = [None] * launch.world_size
        dist.all_gather_object(complaints, complaint)
    return next((found for found in complaints if found is not None), None)


def share_from_first(launch: Launch, value: Shared) -> Shared:
    """Rank 0's `value`, on every rank. Collective."""
    if launch.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def world_size_error(world_size: int, grid_size: int, dp_is_free: bool) -> str | None:
    """Why a world does not fit a layout, with the likely cause; None when it fits."""
    fits = world_size % grid_size == 0 if dp_is_free else world_size == grid_size
    if fits:
        return None
    wanted = f"a multiple of {grid_size}" if dp_is_free else str(grid_size)
    hint = f"Start {grid_size} processes, or change the layout."
    if world_size == 1:
        hint = (
            f"Start it with `deepspeed --num_gpus {grid_size}` or `torchrun --nproc-per-node {grid_size}`. "
            "On CPU `accelerate launch` starts one process unless it is called as "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {grid_size}`."
        )
    return f"{world_size} process(es) were started, the layout needs {wanted} (tp x pcp x dp). {hint}"


def is_peer_loss(error: BaseException) -> bool:
    """Whether `error` only echoes the end of another rank (a framework's own collectives raise what they like)."""
    if isinstance(error, PeerLostError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in words for word in _PEER_LOSS_WORDS)


def die(launch: Launch, error: BaseException, *, program: str) -> NoReturn:
    """End this rank at once; the closed connections end the others. The rank that failed is the one that explains."""
    if isinstance(error, EngineFaultError):  # every rank has found the same
        if launch.rank == 0:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        time.sleep(PEER_GRACE_S if launch.rank else 0)
    elif is_peer_loss(error):
        time.sleep(PEER_GRACE_S)
        print(f"{program}: rank {launch.rank} ends because another rank ended", file=sys.stderr, flush=True)
    elif isinstance(error, StreamEndedError):  # another rank has left, and says why
        time.sleep(PEER_GRACE_S)
        print(f"{program}: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, OutputError):
        print(f"{program}: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
    else:
        print(f"{program}: rank {launch.rank} failed", file=sys.stderr)
        traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(1)
