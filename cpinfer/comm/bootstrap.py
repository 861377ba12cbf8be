"""Starting and ending the processes' common life: what the launcher said, the default group, how a rank dies.

The environment is an argument here; only tools read it.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from cpinfer.comm.losses import is_peer_loss, is_timeout
from cpinfer.comm.parent import first_parent
from cpinfer.comm.rank_watch import BEAT_S, OVERDUE_S, PATIENCE_S, SILENT_S, RankWatch, set_timeout
from cpinfer.config import ParallelConfig
from cpinfer.errors import (
    EngineFaultError,
    ModelChangedError,
    OutputError,
    RanksDifferError,
    RanksMissingError,
    StreamEndedError,
    UserError,
)

Shared = TypeVar("Shared")

# How long the other ranks of a failed run wait for their launcher to end them before they leave by themselves.
PEER_GRACE_S = 5.0

# How long the first rank leaves one that has more to say of the same failure, before the launcher ends them all.
OWN_ERROR_GRACE_S = 0.5

# How long a collective of a job waits when nothing else ends it.
_AT_MOST_S = 24 * 3600.0

# How often a rank looks whether its launcher is still there.
_LAUNCHER_CHECK_S = 1.0


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
def default_group(launch: Launch, timeout_s: float = ParallelConfig.collective_timeout_s) -> Iterator[None]:
    """The default process group for the length of the block: gloo on CPU, NCCL beside it on CUDA.

    Of ranks that wait in a collective, each for itself ends this process, with the names of those that do not come:
    `timeout_s` after some of them have shown no sign of life, or when some show them and have been at one place, in no
    collective, for half an hour (or `timeout_s`). Others are awaited: a replica may have more to do, or load longer.
    After an error it is not torn down in an orderly way, since that would wait for ranks that may wait for us.
    """
    if launch.world_size == 1:
        yield
        return
    cuda = launch.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(launch.device)
    start = datetime.timedelta(seconds=max(timeout_s, ParallelConfig.collective_timeout_s))  # of ranks that never begin
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=start)
    # From here on ranks show signs of life, of which collectives themselves know nothing.
    timeout = datetime.timedelta(seconds=max(timeout_s, _AT_MOST_S))
    if dist.is_initialized():
        set_timeout(dist.group.WORLD, timeout)
    watch = RankWatch(
        launch.rank,
        range(launch.world_size),
        "job",
        partial(end_process, launch.rank),
        stuck_s=max(timeout_s, PATIENCE_S),
        overdue_s=3 * OVERDUE_S,  # the watch of a replica knows the step
        sets_timeouts=False,
    )
    with _default_timeout(timeout), watch.running(), watch.waiting(timeout_s), watch.at("a collective of the job"):
        yield
    # A group that outlives its destruction, in a reference cycle of anyone's, ends with the interpreter, and gloo's
    # threads then abort the process about once in ten runs.
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def _default_timeout(timeout: datetime.timedelta) -> Iterator[None]:
    """What torch gives groups without a timeout of their own, half an hour else: frameworks make such groups."""
    before = {name: getattr(c10d, name) for name in ("default_pg_timeout", "default_pg_nccl_timeout")}
    for name in before:
        setattr(c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process, be it the only one."""
    # Operators of clusters set the world's variables for a whole container; a local rank comes from a launcher alone.
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environ.keys()


def end_with_launcher(environ: Mapping[str, str], *, program: str) -> None:
    """From now on, end this process when the launcher that started it has ended: nobody else would.

    Nothing happens in a process that no launcher started; its parent, a shell perhaps, may go.
    """
    if not is_launched(environ):
        return
    launcher = first_parent()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LAUNCHER_CHECK_S)
        print(f"{program}: rank {environ['RANK']} ends because its launcher ended", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def first_complaint(launch: Launch, complaint: str | None) -> str | None:
    """The complaint of the lowest rank that has one, on every rank; None when nobody complains. Collective."""
    complaints: list[str | None] = [complaint]
    if launch.world_size > 1:
        complaints = [None] * launch.world_size
        dist.all_gather_object(complaints, complaint)
    return next((found for found in complaints if found is not None), None)


def broadcast_object(launch: Launch, value: Shared) -> Shared:
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


def end_process(rank: int, missing: RanksMissingError, *, program: str = "cpinfer") -> NoReturn:
    """End this rank, which waits for others that do not come."""
    print(f"{program}: rank {rank} ends: {missing}", file=sys.stderr, flush=True)
    # The launcher ends all with the first that ends, and the first rank may hold the store that others still read: they
    # find out within a beat of each other.
    time.sleep(OWN_ERROR_GRACE_S if rank else OWN_ERROR_GRACE_S + 2 * BEAT_S)
    os._exit(1)


def die(launch: Launch, error: BaseException, *, program: str) -> NoReturn:
    """End this rank at once; the closed connections end the others. The rank that failed is the one that explains."""
    if isinstance(error, EngineFaultError):  # every rank has found the same
        if launch.rank == 0:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        time.sleep(PEER_GRACE_S if launch.rank else 0)
    elif isinstance(error, RanksMissingError):
        # Who has ended may say why; the roll call has taken part of that time.
        lost = error.__cause__ is not None and is_peer_loss(error.__cause__)
        time.sleep(max(0.0, PEER_GRACE_S - SILENT_S) if lost else 0)
        end_process(launch.rank, error, program=program)
    elif is_peer_loss(error):
        time.sleep(PEER_GRACE_S)
        print(f"{program}: rank {launch.rank} ends because another rank ended", file=sys.stderr, flush=True)
    elif isinstance(error, StreamEndedError):  # another rank has left, and says why
        time.sleep(PEER_GRACE_S)
        print(f"{program}: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, RanksDifferError):  # all ranks have it, but for one whose own error it may quote
        time.sleep(PEER_GRACE_S if launch.rank else OWN_ERROR_GRACE_S)
        print(f"{program}: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, (ModelChangedError, OutputError)):
        print(f"{program}: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
    elif is_timeout(error):
        print(
            f"{program}: rank {launch.rank} ends because another rank did not come to a collective in time; it is "
            "stopped, stuck, or slower than collective_timeout_s allows. "
            f"{str(error).strip().splitlines()[0]}",
            file=sys.stderr,
            flush=True,
        )
    elif isinstance(error, UserError):  # as a rule of all ranks: the first speaks, and the launcher ends the others
        time.sleep(PEER_GRACE_S if launch.rank else 0)
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    else:
        print(f"{program}: rank {launch.rank} failed", file=sys.stderr)
        traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(1)
