"""Compare layouts: one evaluation over each of them, the same samples, and what differs.

    cpinfer compare --config configs/compare_recall.json
    cpinfer compare --config configs/compare_published.json --launcher deepspeed
    cpinfer compare --config configs/compare_recall.json --layouts tp1 pcp2 pcp4_dcp2 --output runs/mine --reuse

Each layout runs `cpinfer eval` on as many processes as it has ranks, one layout after the other; the first is
the reference. Where the config samples (temperature above 0), each layout runs twice: greedy with the first seed, since
greedy tokens must be the same, and sampled with all seeds, for the accuracy that papers print.

OUTPUT/report.html (one file, pictures inside), report.md, comparison.json and plots/ hold the result, OUTPUT/<layout>/
the samples, configs and logs of its runs. With `wandb` in the config the same goes to W&B, offline without an API key.

A layout disagrees when greedy tokens differ other than at near-ties, or when a logprob is further from the reference's
than the tolerance: exit 1, and where. With --bitwise all run with `deterministic`, and nothing may differ at all.
Exit 2: bad config or layout, found before anything runs. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import transformers

from cpinfer.errors import UserError
from cpinfer.models.spec import ModelSpec
from cpinfer_tools.evaluation.questions import make_questions, settled
from cpinfer_tools.job import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    NO_REPORTS,
    Parser,
    add_launch_flags,
    check_extras,
    needed_spec,
    needed_tokenizer,
    needed_weights,
)
from cpinfer_tools.results.output import default_output
from cpinfer_tools.results.output_lock import locked
from cpinfer_tools.run_config import RunConfig
from cpinfer_tools.verify.comparison.evaluations import (
    Evaluation,
    contents_of,
    evaluate,
    evaluations_of,
    is_complete,
)
from cpinfer_tools.verify.comparison.launches import check_can_launch, interruptible, last_lines
from cpinfer_tools.verify.comparison.layouts import Layout, load_comparison, resolve_layouts
from cpinfer_tools.verify.comparison.results import Results, log_to_wandb, summarize, write_results
from cpinfer_tools.verify.comparison.samples import Run, read_run

# Differences that rounding explains; half precision keeps 8 or 11 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
# Disagreements that people and the last line see; comparison.json has all.
NUM_SHOWN = 10


@dataclass(frozen=True)
class Job:
    """A comparison that is known to be runnable; all of this is worked out before anything is launched."""

    config: RunConfig
    spec: ModelSpec
    layouts: tuple[Layout, ...]
    evaluations: tuple[Evaluation, ...]
    tolerance: float
    output: Path
    args: argparse.Namespace


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="as of cpinfer eval, with `comparison`")
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="NAME",
        help="names such as tp4_pcp2_dcp4, or configs; the first is the reference",
    )
    add_launch_flags(parser, each="each run of a layout")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--tolerance", type=float, metavar="NATS", help="largest logprob difference that passes")
    limit.add_argument(
        "--bitwise", action="store_true", help="run deterministically, and let no token and no bit of a logprob differ"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--reuse", action="store_true", help="keep complete runs of the same config, model and tasks, run the others"
    )
    existing.add_argument("--overwrite", action="store_true", help="run everything again in a folder that exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    os.environ.setdefault(*NO_REPORTS)
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        try:
            job = prepare(parse_args(argv, prog))
            if job.args.dry_run:
                return tell_plan(job)
            stack.enter_context(locked(job.output / "comparison.json"))
        except UserError as error:
            print(f"compare: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        code = interruptible(
            "compare", lambda: compare(job), f"--output {job.output} --reuse goes on with what is missing."
        )
        return EXIT_FAILURE if code is None else code


def prepare(args: argparse.Namespace) -> Job:
    """Check everything that can be checked before the first launch. UserError says what is wrong."""
    output = Path(args.output) if args.output else default_output(args.config, _now()).parent
    instead = "Keep its complete runs with --reuse, or run all with --overwrite."
    check_can_launch(
        os.environ, args.launcher, output, args.timeout_s, may_exist=args.reuse or args.overwrite, instead=instead
    )
    config, base = load_comparison(args.config, [*args.set, *["deterministic=true"] * args.bitwise])
    spec = needed_spec(config, args.config)
    asked = settled(config, spec.max_positions)
    wanted = args.layouts or config.comparison.layouts
    layouts = resolve_layouts(wanted, base, Path(args.config).parent, spec)
    if args.bitwise and len({layout.sizes.tp_size for layout in layouts}) > 1:
        names = ", ".join(layout.name for layout in layouts)
        raise UserError(f"--bitwise is for layouts of one tp size, which are the same sums; found {names}.")
    wandb = None if args.no_wandb else config.wandb
    for layout in layouts:
        check_extras(replace(layout.config, wandb=wandb), args.config)
    needed_weights(config)  # the same for all runs
    wanted_tolerance = args.tolerance if args.tolerance is not None else config.comparison.tolerance
    wanted_tolerance = 0.0 if args.bitwise else wanted_tolerance
    tolerance = TOLERANCE[config.dtype] if wanted_tolerance is None else wanted_tolerance
    if not 0 <= tolerance < float("inf"):
        raise UserError(f"--tolerance {tolerance} must be at least 0 and finite.")
    make_questions(asked, needed_tokenizer(config))  # whatever is wrong with a task shows here, not in the first run
    evaluations = [e for layout in layouts for e in evaluations_of(layout, output)]
    return Job(config, spec, tuple(layouts), tuple(evaluations), tolerance, output, args)


def tell_plan(job: Job) -> int:
    """What would run: for people, and as the last line of stdout."""
    for evaluation in job.evaluations:
        sizes = evaluation.layout.sizes
        print(
            f"compare: {evaluation.layout.name}, {evaluation.passed}: {sizes.world_size} process(es)", file=sys.stderr
        )
    names = [layout.name for layout in job.layouts]
    print(json.dumps({"dry_run": True, "layouts": names, "num_runs": len(job.evaluations)}), flush=True)
    return EXIT_DONE


def compare(job: Job) -> int:
    """Run what is missing, then write everything that follows from it."""
    started_s = time.perf_counter()
    runs: list[Run] = []
    contents = contents_of(job.evaluations, job.spec) if job.args.reuse else {}
    for number, evaluation in enumerate(job.evaluations, start=1):
        name = f"[{number}/{len(job.evaluations)}] {evaluation.layout.name}, {evaluation.passed}"
        if job.args.reuse and is_complete(evaluation, contents[evaluation.passed]):
            print(f"compare: {name}: kept", file=sys.stderr)
        else:
            print(f"compare: {name}: {evaluation.layout.sizes.world_size} process(es)", file=sys.stderr, flush=True)
            ended = evaluate(evaluation, job.args.launcher, job.args.timeout_s, os.environ, job.args.log_level)
            if ended.returncode != 0:
                return _failed(name, evaluation, ended.returncode, job)
            print(f"compare: {name}: done in {ended.wall_s:.0f} s", file=sys.stderr, flush=True)
        runs.append(read_run(evaluation.layout.name, evaluation.passed, evaluation.output))
    results = Results.of(job.config, job.spec, job.layouts, runs, job.tolerance, num_workers())
    written = write_results(results, job.output, title=Path(job.args.config).stem)
    if not job.args.no_wandb:
        complaint = log_to_wandb(results, job.evaluations, written, os.environ)
        if complaint is not None:
            print(f"compare: {complaint}", file=sys.stderr)
    print(written.text, file=sys.stderr)
    for disagreement in results.disagreements[:NUM_SHOWN]:
        print(f"compare: disagreement: {disagreement}", file=sys.stderr)
    if len(results.disagreements) > NUM_SHOWN:
        print(f"compare: and {len(results.disagreements) - NUM_SHOWN} more, in {written.json}", file=sys.stderr)
    print(f"compare: {results.verdict} {written.html}", file=sys.stderr, flush=True)
    summary = summarize(results, NUM_SHOWN)
    print(json.dumps({**summary, "wall_s": time.perf_counter() - started_s, "report": str(written.html)}), flush=True)
    return EXIT_DONE if results.ok else EXIT_FAILURE


def num_workers() -> int:
    """What computes at once on this machine: its GPUs, else its cores."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def _failed(name: str, evaluation: Evaluation, returncode: int | None, job: Job) -> int:
    how = f"did not end within {job.args.timeout_s:g} s" if returncode is None else f"ended with exit code {returncode}"
    print(f"compare: {name} {how}; the end of {evaluation.log}:", file=sys.stderr)
    print(last_lines(evaluation.log), file=sys.stderr)
    print(f"compare: fix it, then --output {job.output} --reuse keeps what is complete.", file=sys.stderr, flush=True)
    # What an evaluation says of its tasks before it loads a model is bad input to us as well.
    return EXIT_BAD_INPUT if returncode == EXIT_BAD_INPUT else EXIT_FAILURE


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
