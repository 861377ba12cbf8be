"""Opening an output on many ranks: one of them opens it, all know it before anyone writes, and all writers see it."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpinfer.comm.bootstrap import Launch, broadcast_object, first_complaint
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.results.finished import flat
from cpinfer_tools.results.output import check_output, open_output, part_path
from cpinfer_tools.results.output_lock import locked

if TYPE_CHECKING:
    from cpinfer_tools.job import OutputJob

    J = TypeVar("J", bound=OutputJob)

# How long a file that one host has made may take to show on another.
SEEN_WITHIN_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Opening:
    """What the first rank tells the others: where it looks, what is done already, and a file that they should see."""

    complaint: str | None
    place: str
    token: str
    done: frozenset[Any]
    made_of: Mapping[str, Any]


def is_writer(grid: RankGrid, rank: int) -> bool:
    """Whether a rank writes the results of its dp replica."""
    coords = grid.coords(rank)
    return coords.pcp_rank == coords.tp_rank == 0


def open_together(launch: Launch, job: J, stack: ExitStack) -> tuple[J, str | None]:
    """The job with what is done already, or why it cannot be: the same on every rank. Collective.

    The output is locked until `stack` closes. Nothing of an earlier run is touched before all ranks agree. A dry run
    asks what can be asked without touching anything.
    """
    is_first = launch.rank == 0
    with ExitStack() as until_seen:
        opening = _begin(launch, job, stack, until_seen) if is_first else None
        opening = broadcast_object(launch, opening)
        assert opening is not None, "the first rank has told"
        complaint = opening.complaint
        if complaint is None and not job.dry_run:
            complaint = first_complaint(launch, None if is_first else _doubt(launch, job, opening))
    if complaint is None and is_first and not job.dry_run:
        complaint = _complaint_of_opening(job)
    complaint = broadcast_object(launch, complaint)
    return replace(job, done=opening.done), complaint


def _begin(launch: Launch, job: J, stack: ExitStack, until_seen: ExitStack) -> Opening:
    place, made_of = _place(job.output), flat(job.meta.get("made_of", {}))
    try:
        if job.dry_run:
            return Opening(None, place, "", job.read_done(), made_of)
        stack.enter_context(locked(job.output))
        check_output(job.output, job.existing)  # again: another run may have come and gone
        done = job.read_done()
        token = until_seen.enter_context(_token(job.output)) if launch.world_size > 1 else ""
        return Opening(None, place, token, done, made_of)
    except UserError as error:
        return Opening(str(error), place, "", frozenset(), made_of)


def _complaint_of_opening(job: OutputJob) -> str | None:
    try:
        open_output(job.output, job.existing, job.meta)
    except UserError as error:
        return str(error)
    return None


def _doubt(launch: Launch, job: OutputJob, opening: Opening) -> str | None:
    """Why this rank cannot take part: it runs something else, or its replica would write somewhere else."""
    mine = flat(job.meta.get("made_of", {}))
    others = [name for name in opening.made_of if mine.get(name) != opening.made_of[name]]
    if others:
        return (
            f"rank {launch.rank} on {socket.gethostname()} does not have rank 0's {others[0].replace('_', ' ')}: "
            f"{mine.get(others[0])} there, {opening.made_of[others[0]]} on rank 0. Give all ranks the same config and "
            "files."
        )
    if not is_writer(job.grid, launch.rank):
        return None
    part = part_path(job.output, job.grid.coords(launch.rank).dp_rank)
    if not _shows(job.output.with_name(opening.token)):
        return (
            f"rank {launch.rank} writes {_place(part)}, and does not see what rank 0 makes beside {opening.place}: the "
            "parts of the replicas could not be joined. Use an output in a folder that all of them share."
        )
    try:
        check_output(part, "resume")
    except UserError as error:
        return f"rank {launch.rank} on {socket.gethostname()}: {error}"
    return None


def _place(path: Path) -> str:
    return f"{path.absolute()} on {socket.gethostname()}"


@contextmanager
def _token(output: Path) -> Iterator[str]:
    """The name of a file beside an output, there for the length of the block.

    A name that nobody can have looked for before: network file systems remember for a while what was not there.
    """
    token = output.with_name(f"{output.name}.{secrets.token_hex(4)}")
    try:
        token.touch()
    except OSError as error:
        raise UserError(f"output {output} cannot be opened: {error.strerror} ({token}).") from error
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)


def _shows(path: Path) -> bool:
    until_s = time.monotonic() + SEEN_WITHIN_S
    while not os.path.exists(path):
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    return True
