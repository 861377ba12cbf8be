"""What every tool that runs on many ranks shares: its life under a launcher, the layout, the model, one voice.

A tool hands `run_tool` two functions: `prepare`, which finds everything that is wrong before weights load, and `work`,
which every rank enters when nobody has found anything.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
import transformers

from cpinfer.comm.bootstrap import (
    Launch,
    default_group,
    die,
    first_complaint,
    share_from_first,
)
from cpinfer.config import Config, config_to_dict
from cpinfer.engine.attach import config_errors
from cpinfer.engine.engine import affordable_pool
from cpinfer.engine.output import Existing, check_output, default_output
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.layout.grid import RankGrid
from cpinfer.models.spec import ModelSpec
from cpinfer_integrations.launching import grid_for

EXIT_DONE, EXIT_FAILURE, EXIT_BAD_INPUT = 0, 1, 2

Told = TypeVar("Told")


class Job(Protocol):
    """What `run_tool` needs to know of a tool's job."""

    @property
    def output(self) -> Path:
        """Where results go: of a default name, which has the time in it, the first rank's is the one."""


J = TypeVar("J", bound=Job)


class Parser(argparse.ArgumentParser):
    """Raises instead of printing: with many ranks only one should speak."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def add_common_flags(parser: argparse.ArgumentParser, *, can_resume: bool = True) -> None:
    """Flags of every tool that runs a config: --config, --output, --set, --dry-run, --resume | --overwrite."""
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON config; see the README for its keys")
    parser.add_argument("--output", metavar="FILE", help="results, JSON Lines; wins over the config")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override a config key; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, load and run nothing")
    existing = parser.add_mutually_exclusive_group()
    if can_resume:
        existing.add_argument("--resume", action="store_true", help="continue an output with the samples it lacks")
    existing.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers append it; ignored


def run_tool(
    tool: str, prepare: Callable[[Launch], J], work: Callable[[Launch, J], int], at_output: Callable[[J, Path], J]
) -> int:
    """The life of a tool on one rank; the exit code. A failure of many ranks ends the process here."""
    try:
        launch = Launch.from_environ(os.environ)
    except UserError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    transformers.utils.logging.disable_progress_bar()  # one bar per rank is noise; ours is enough
    try:
        return _run(tool, launch, prepare, work, at_output)
    except SystemExit:  # --help
        raise
    except BaseException as error:
        if launch.world_size == 1:
            raise
        die(launch, error, program=tool)


def _run(
    tool: str,
    launch: Launch,
    prepare: Callable[[Launch], J],
    work: Callable[[Launch, J], int],
    at_output: Callable[[J, Path], J],
) -> int:
    job: J | None = None
    complaint: str | None = None
    try:
        job = prepare(launch)
    except UserError as error:
        complaint = str(error)
    with default_group(launch):
        # The ranks compare complaints before any goes on: one voice speaks, all leave, none waits for another.
        complaint = first_complaint(launch, complaint)
        if complaint is not None:
            if launch.rank == 0:
                print(f"{tool}: {complaint}", file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT
        assert job is not None, "without a complaint there is a job"
        # Each rank has read its own clock for a default name; the first rank's is the one.
        return work(launch, at_output(job, Path(share_from_first(launch, str(job.output)))))


def check_layout(launch: Launch, config: Config, spec: ModelSpec, config_path: str) -> RankGrid:
    """The rank grid of a config in this world. UserError when the model or the world does not fit it."""
    errors = config_errors(spec, config, config.data_parallel_size or 1)
    if errors:
        raise UserError(f"config {config_path}: " + " ".join(errors))
    return grid_for(config, launch.world_size)


def pool_size(spec: ModelSpec, grid: RankGrid, config: Config, device: torch.device) -> PoolSize:
    """The KV pool of the rank that stores the most heads."""
    return affordable_pool(spec, spec.heads(grid.tp_size).max_stored_heads(grid), config, config.dtype, device)


def wanted_output(config: Config, args: argparse.Namespace) -> tuple[Path, Existing]:
    """Where results go, and what becomes of an output that is there. UserError when nobody has said."""
    output = Path(config.output) if config.output else default_output(args.config, datetime.datetime.now(datetime.UTC))
    existing: Existing = "resume" if getattr(args, "resume", False) else "overwrite" if args.overwrite else "refuse"
    check_output(output, existing)
    return output, existing


def gather(launch: Launch, told: Told) -> list[Told]:
    """What each rank tells, in rank order. Collective."""
    if launch.world_size == 1:
        return [told]
    all_told = [told] * launch.world_size
    dist.all_gather_object(all_told, told)
    return all_told


def describe_run(config: Config, grid: RankGrid, launch: Launch) -> dict[str, Any]:
    """What OUTPUT.meta.json says: everything needed to make the output again."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    if config.tp_size > 1 and config.tensor_parallel.provider == "autotp":
        import deepspeed

        versions["deepspeed"] = deepspeed.__version__
    sizes = {"tp": grid.tp_size, "pcp": grid.pcp_size, "dcp": grid.dcp_size, "dp": grid.dp_size}
    device = torch.cuda.get_device_name(launch.device) if launch.device.type == "cuda" else platform.machine()
    return {
        "config": config_to_dict(config),
        "versions": versions,
        "git_revision": _git_revision(),
        "layout": {**sizes, "world_size": grid.world_size},
        "device": device,
    }


def headline(config: Config, grid: RankGrid, what: str, output: Path) -> str:
    """Two lines for people: what runs on which layout, and how the rank table below it is to be read."""
    return (
        f"{config.model} ({config.dtype}) on {grid.world_size} rank(s): tp={grid.tp_size} pcp={grid.pcp_size} "
        f"dcp={grid.dcp_size} dp={grid.dp_size}; {what} -> {output}\n"
        "rank: query heads / stored KV heads / KV shard / prefill part"
    )


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
