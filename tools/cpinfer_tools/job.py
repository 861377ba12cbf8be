"""What every tool that runs on many ranks shares: its life under a launcher, the layout, the model, one voice.

A tool hands `run_tool` two functions: `prepare`, which finds everything that is wrong before weights load and gives a
`Job`, and `work`, which every rank enters when nobody has found anything. In between the first rank says what will run;
a dry run ends there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import transformers

import cpinfer
from cpinfer.attention.backends.registry import check_choice
from cpinfer.comm.bootstrap import (
    PEER_GRACE_S,
    Launch,
    broadcast_object,
    default_group,
    die,
    end_with_launcher,
    first_complaint,
)
from cpinfer.config import ParallelConfig, config_to_dict
from cpinfer.engine.attach import config_errors
from cpinfer.engine.deterministic import prepare_deterministic
from cpinfer.engine.engine import Engine
from cpinfer.engine.needs import affordable_pool, attention_needs, cached_states, kernel_bytes
from cpinfer.engine.prompts import check_sampling
from cpinfer.errors import EngineFaultError, ModelChangedError, OutputError, UserError
from cpinfer.layout.capacity import PoolSize, StateLayout
from cpinfer.layout.explain import draw_grid
from cpinfer.layout.grid import RankGrid
from cpinfer.logs import LEVELS, log_to
from cpinfer.models.checkpoint import named
from cpinfer.models.expected_weights import Weights
from cpinfer.models.loading import known_weights, load_spec, load_tokenizer
from cpinfer.models.spec import ModelSpec
from cpinfer.packages import need_package
from cpinfer_integrations.launching import check_packages, grid_for
from cpinfer_tools.memory import Fit, MemoryNeeds, available_memory
from cpinfer_tools.opening import is_writer, open_together
from cpinfer_tools.progress import Loading, Tokens, loading
from cpinfer_tools.quiet import quiet_others
from cpinfer_tools.results.output import Existing, check_output, default_output
from cpinfer_tools.run_config import RunConfig

# W&B tells its makers of its own errors, also offline, unless this says no.
NO_REPORTS = ("WANDB_ERROR_REPORTING", "false")

EXIT_DONE, EXIT_FAILURE, EXIT_BAD_INPUT = 0, 1, 2
# Of what a tool launches, when nobody says otherwise.
TIMEOUT_S = 6 * 3600.0

Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """What a tool is to do, known to be possible: all of this is worked out before a model is loaded."""

    config: RunConfig
    spec: ModelSpec
    weights: Weights
    grid: RankGrid
    tokenizer: Any  # None where the model's folder has none
    meta: Mapping[str, Any]
    dry_run: bool
    log_level: str = "warning"

    @property
    def shown_logs(self) -> Sequence[str]:
        """Loggers of which people see more than of the others unless they ask for less: INFO."""
        return ()

    @property
    @abstractmethod
    def what(self) -> str:
        """What will run, in one line for people."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """How much there is to do, for the last line of a dry run."""

    @property
    def notes(self) -> Sequence[str]:
        """What people should know beside it."""
        return ()


@dataclass(frozen=True, kw_only=True)
class OutputJob(Job):
    """One that leaves results in a file."""

    output: Path
    existing: Existing
    done: frozenset[Any] = frozenset()  # what an earlier run has left; known when the output is open

    def read_done(self) -> frozenset[Any]:
        """What an earlier run has left in the output, by key. UserError when it is not to be continued."""
        return frozenset()


J = TypeVar("J", bound=Job)


class Parser(argparse.ArgumentParser):
    """Raises instead of printing: with many ranks only one should speak."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def add_common_flags(parser: argparse.ArgumentParser, *, can_resume: bool = True) -> None:
    """Flags of every tool that is launched itself: --config, --output, --resume | --overwrite, and `add_run_flags`."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON or TOML; docs/reference/config.md has its keys"
    )
    parser.add_argument("--output", metavar="FILE", help="results, JSON Lines; wins over the config")
    add_run_flags(parser)
    existing = parser.add_mutually_exclusive_group()
    if can_resume:
        existing.add_argument("--resume", action="store_true", help="continue an output with the samples it lacks")
    existing.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers append it; ignored


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every tool that runs a config: --set, --dry-run, --log-level."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override a config key; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, load and run nothing")
    parser.add_argument("--log-level", choices=LEVELS, default="warning", help="of cpinfer's logs, on stderr")


def add_launch_flags(parser: argparse.ArgumentParser, *, each: str) -> None:
    """Flags of every tool that launches others, `each` for a time of its own; and `add_run_flags`."""
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--output", metavar="DIR", help="default: a new folder under runs/")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help=f"of {each} (default: 6 h)")
    parser.add_argument("--no-wandb", action="store_true", help="local files only")
    add_run_flags(parser)


def run_tool(tool: str, prepare: Callable[[Launch], J], work: Callable[[Launch, J], None]) -> int:
    """The life of a tool on one rank; the exit code. A failure of many ranks ends the process here."""
    try:
        launch = Launch.from_environ(os.environ)
    except UserError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    os.environ.setdefault(*NO_REPORTS)
    end_with_launcher(os.environ, program=tool)
    transformers.utils.logging.disable_progress_bar()  # one bar per rank is noise; ours is enough
    try:
        with quiet_others(launch.rank):
            return _run(tool, launch, prepare, work)
    except SystemExit:  # --help
        raise
    except BaseException as error:
        if launch.world_size == 1 and isinstance(error, (EngineFaultError, ModelChangedError, OutputError, UserError)):
            print(f"{tool}: {error}", file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
        if launch.world_size == 1:
            raise
        die(launch, error, program=tool)


def _run(tool: str, launch: Launch, prepare: Callable[[Launch], J], work: Callable[[Launch, J], None]) -> int:
    job: J | None = None
    complaint: str | None = None
    try:
        job = prepare(launch)
    except UserError as error:
        complaint = str(error)
    # A rank that found something wrong may know no config: what it has to say is said soon.
    timeout_s = ParallelConfig.collective_timeout_s if job is None else job.config.collective_timeout_s
    with default_group(launch, timeout_s), ExitStack() as stack:
        # The ranks compare complaints before any goes on: one voice speaks, all leave, none waits for another.
        complaint = first_complaint(launch, complaint)
        if complaint is None and isinstance(job, OutputJob):
            # Each rank has read its own clock for a default name; the first rank's is the one.
            job = replace(job, output=Path(broadcast_object(launch, str(job.output))))
            job, complaint = open_together(launch, job, stack)
        if complaint is None:
            assert job is not None, "without a complaint there is a job"
            if launch.rank == 0:
                announce(tool, job)
            stack.enter_context(log_to(job.log_level, sys.stderr, launch.rank, launch.world_size, shown=job.shown_logs))
            if not job.dry_run:
                work(launch, job)
            elif launch.rank == 0:
                print(json.dumps(dry_run_summary(tool, job, launch)), flush=True)
            return EXIT_DONE
    if launch.rank == 0:
        print(f"{tool}: {complaint}", file=sys.stderr, flush=True)
    else:
        time.sleep(PEER_GRACE_S)  # a launcher ends all ranks with the first that ends, and that one is to speak
    return EXIT_BAD_INPUT


def announce(tool: str, job: Job) -> None:
    """For people: what runs on which layout, the rank table with how to read it, and the job's notes."""
    grid, output = job.grid, f" -> {job.output}" if isinstance(job, OutputJob) else ""
    print(
        f"{job.config.model} ({job.config.dtype}) on {grid.world_size} rank(s): tp={grid.tp_size} pcp={grid.pcp_size} "
        f"dcp={grid.dcp_size} dp={grid.dp_size}; {job.what}{output}\n"
        "rank: query heads / stored KV heads / KV shard / prefill part\n\n"
        f"{draw_grid(grid, job.spec.heads(grid.tp_size))}",
        file=sys.stderr,
    )
    for note in [*_weights_notes(job), *job.notes]:
        print(f"{tool}: {note}", file=sys.stderr)


def _weights_notes(job: Job) -> list[str]:
    unexpected = job.weights.unexpected
    if not unexpected:
        return []
    return [
        f"{len(unexpected)} tensor(s) of the model's files have no place in it and are left out: {named(unexpected)}"
    ]


def dry_run_summary(tool: str, job: Job, launch: Launch) -> dict[str, Any]:
    """What a dry run leaves on stdout. On stderr, whether this machine could hold it."""
    pool = pool_size(job.spec, job.grid, job.config, launch.device)
    num_heads = job.spec.heads(job.grid.tp_size).max_stored_heads(job.grid)
    dtype = job.config.cache_dtype(job.config.dtype)
    per_token = job.spec.kv_layout(num_heads).bytes_per_token(job.spec.num_kv_layers, dtype)
    spec = replace(job.spec, states=rank_states(job.spec, job.grid, job.config))
    per_state = 0 if spec.states is None else spec.states.bytes_per_sequence(job.config.dtype)
    num_states = pool.num_states + cached_states(spec, job.config, job.config.dtype)
    tp_size = job.grid.tp_size
    needs = MemoryNeeds(
        weights_bytes=job.weights.bytes_per_rank(tp_size),
        kv_pool_bytes=pool.num_blocks * job.config.block_size * per_token + num_states * per_state,
        loading_bytes=job.weights.bytes_per_rank(tp_size),  # a rank reads what it keeps
        kernels_bytes=_kernel_bytes(job.spec, job.grid, job.config, launch.device),
    )
    memory = Fit(needs, available_memory(launch, os.environ))
    print(f"{tool}: {memory.sentence}", file=sys.stderr, flush=True)
    capacity = {"kv_capacity_tokens": pool.capacity_tokens, "num_parameters": job.weights.num_parameters}
    return {"dry_run": True, **job.counts, **capacity, **memory.summary, "layout": job.meta["layout"]}


def loading_weights(tool: str, job: Job, launch: Launch) -> AbstractContextManager[Loading]:
    """A block in which the job's weights load; the first rank says so."""
    weights = f"{job.weights.bytes_per_rank(1) / 1e9:.2g} GB in {job.config.dtype}"
    where = f"on {launch.world_size} rank(s) ({launch.device.type})"
    return loading(tool, f"{job.config.model}: {weights}, {where}", shown=launch.rank == 0)


def tokens_of(engine: Engine) -> Tokens:
    """What an engine has computed so far in the call that runs, for `Progress`."""
    return Tokens(engine.stats.num_generated_tokens, engine.stats.num_computed_prefill_tokens)


def of_replica(grid: RankGrid) -> str:
    """What the counts of the first rank are of, where they are not the whole job's."""
    return "" if grid.dp_size == 1 else f" (replica 0 of {grid.dp_size})"


def needed_spec(config: RunConfig, config_path: str) -> ModelSpec:
    """What the config's model is. UserError when it names none."""
    if config.model is None:
        raise UserError(f'config {config_path}: "model" is missing; a Hugging Face id or a folder was wanted.')
    try:
        return load_spec(config.model).with_max_model_len(config.max_model_len)
    except UserError as error:
        raise type(error)(f"config {config_path}: {error}") from error


def needed_weights(config: RunConfig, *, in_files: bool = True) -> Weights:
    """What is known of the model's weights; `in_files`: they are to be found, whole, in its files.

    UserError when they are not, as far as the files are on this machine.
    """
    assert config.model is not None, "needed_spec has refused that"
    return known_weights(config.model, getattr(torch, config.dtype), in_files=in_files)


def needed_tokenizer(config: RunConfig) -> Any:
    """The model's own tokenizer. UserError when it has none."""
    tokenizer = None if config.model is None else load_tokenizer(config.model)
    if tokenizer is None:
        raise UserError(f"model {config.model}: its folder has no tokenizer; prompts are texts and need one.")
    return tokenizer


def refuse_bad_lines(complaints: Sequence[str], instead: str) -> None:
    """UserError when an input has bad lines: the first, how many more, and what to do `instead`."""
    if complaints:
        more = f" ({len(complaints) - 1} more bad lines)" if len(complaints) > 1 else ""
        raise UserError(f"{complaints[0]}{more} {instead}")


def check_extras(config: RunConfig, config_path: str) -> None:
    """UserError when a package that the config asks for, and that is an extra, is not installed."""
    try:
        check_packages(config)
        if config.wandb is not None:
            need_package("wandb", 'the key "wandb"')
    except UserError as error:
        raise type(error)(f"config {config_path}: {error}") from error


def check_layout(launch: Launch, config: RunConfig, spec: ModelSpec, config_path: str) -> RankGrid:
    """The rank grid of a config in this world. UserError when the model or the world does not fit it."""
    try:
        errors = config_errors(spec, config, config.data_parallel_size or 1)
        if errors:
            raise UserError(" ".join(errors))
        check_sampling(config.sampling, spec)
    except UserError as error:
        raise UserError(f"config {config_path}: {error}") from error
    check_extras(config, config_path)
    grid = grid_for(config, launch.world_size)
    heads = spec.heads(grid.tp_size).in_group(grid, grid.coords(launch.rank).tp_rank)
    try:
        if config.deterministic:
            prepare_deterministic(launch.device)
        else:
            dtypes = (getattr(torch, config.dtype), getattr(torch, config.cache_dtype(config.dtype)))
            check_choice(config.backend, launch.device, attention_needs(spec, heads, *dtypes))
    except UserError as error:
        raise type(error)(f"config {config_path}: {error}") from error
    return grid


def pool_size(spec: ModelSpec, grid: RankGrid, config: RunConfig, device: torch.device) -> PoolSize:
    """The KV pool of the rank that stores the most heads."""
    num_heads = spec.heads(grid.tp_size).max_stored_heads(grid)
    beside_bytes = _kernel_bytes(spec, grid, config, device)
    spec = replace(spec, states=rank_states(spec, grid, config))
    return affordable_pool(spec, num_heads, grid, config, config.dtype, device, beside_bytes)


def _kernel_bytes(spec: ModelSpec, grid: RankGrid, config: RunConfig, device: torch.device) -> int:
    """Of the first rank; others have as many heads, or one less."""
    return kernel_bytes(spec, spec.heads(grid.tp_size).in_group(grid, 0), grid, config, config.dtype, device)


def rank_states(spec: ModelSpec, grid: RankGrid, config: RunConfig) -> StateLayout | None:
    """What a rank keeps of a sequence beside its KV, if anything."""
    if spec.states is None:
        return None
    return spec.states.over(grid.tp_size if config.tensor_parallel.cuts_states else 1)


def wanted_output(config: RunConfig, args: argparse.Namespace, grid: RankGrid, rank: int) -> tuple[Path, Existing]:
    """Where results go, and what becomes of an output that is there. UserError, on writers, when nobody has said."""
    output = Path(config.output) if config.output else default_output(args.config, datetime.datetime.now(datetime.UTC))
    existing: Existing = "resume" if getattr(args, "resume", False) else "overwrite" if args.overwrite else "refuse"
    if is_writer(grid, rank):
        check_output(output, existing)
    return output, existing


def gather(launch: Launch, gathered: Told) -> list[Told]:
    """What each rank tells, in rank order. Collective."""
    if launch.world_size == 1:
        return [gathered]
    all_told = [gathered] * launch.world_size
    dist.all_gather_object(all_told, gathered)
    return all_told


def describe_run(
    config: RunConfig, grid: RankGrid, launch: Launch, made_of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What OUTPUT.meta.json says: everything needed to make the output again.

    `made_of`: what must be the same in a run that continues it, see `cpinfer_tools.results.finished`.
    """
    versions = {"cpinfer": cpinfer.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    if config.tp_size > 1 and config.tensor_parallel.provider == "autotp":
        import deepspeed

        versions["deepspeed"] = deepspeed.__version__
    sizes = {"tp": grid.tp_size, "pcp": grid.pcp_size, "dcp": grid.dcp_size, "dp": grid.dp_size}
    device = torch.cuda.get_device_name(launch.device) if launch.device.type == "cuda" else platform.machine()
    return {
        "config": config_to_dict(config),
        **({} if made_of is None else {"made_of": dict(made_of)}),
        "versions": versions,
        "git_revision": _git_revision(),
        "layout": {**sizes, "world_size": grid.world_size},
        "device": device,
    }


def log_to_wandb(
    tool: str,
    job: OutputJob,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    images: Mapping[str, Path] | None = None,
) -> None:
    """The summary to W&B, where the config asks for it, with `history` and `images` as `log_run` has them.

    That W&B cannot be reached is said once, and is no failure.
    """
    if job.config.wandb is None:
        return
    from cpinfer_integrations.wandb import log_run, may_go_online

    complaint = log_run(
        job.config.wandb,
        job.meta,
        summary,
        job.output,
        has_api_key=may_go_online(os.environ),
        history=history,
        images=images,
    )
    if complaint is not None:
        print(f"{tool}: {complaint}", file=sys.stderr)


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
