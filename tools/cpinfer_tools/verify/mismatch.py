"""How far rollouts are from the training forward: logprobs of the same sampled tokens, layout by layout.

    cpinfer mismatch --config configs/single.json --set sampling.temperature=1
    cpinfer mismatch --config configs/single.json --set sampling.temperature=1 --set dtype=bfloat16 \\
        --layouts tp1 pcp2 tp2_pcp2

Each layout samples its own rollouts (`cpinfer rollout`, one layout after the other, on as many processes as it has
ranks). Then this process loads the whole model once and calls it over every sample, as a trainer does: padded on the
right, no cache, attention as Transformers chooses it. The differences are reported as mean, max, an estimate of
KL(rollout || training) per token, and the share of tokens above 1e-3. Beside the layouts stands Transformers'
`generate`, on left-padded batches of the same prompts, with its own logprobs; it is shown, not judged.

A trainer with tensor parallelism trains under it, so samples of a layout with tp=2 are also compared with the forward
under tp=2, no more of cpinfer in it. In half precision the sums of tensor parallelism alone round more than the limit
(the row "tp=2 forward" has that forward against the whole one), so such a layout is judged by its own forward there,
in float32 by both.

Processed logprobs are compared, at the temperature of the config; where top_k, top_p or min_p cut, the log of the kept
mass is added. Where more shapes the distribution (a penalty, a bias, greedy decoding, ...), raw ones are, at
temperature 1, and the report says so.

Limits: in float32 the largest difference is at most 1e-4, in half precision the mean at most 1e-3. With `deterministic`
the forward is that of `cpinfer.invariant_training`, under the layout's own tensor parallelism, and the largest
difference is 0: every bit agrees. Exit 1 when a layout is over its limit, or fails; 2 for bad config, layout or
prompts, found before anything is launched. OUTPUT/report.md, report.html and mismatch.json hold the result (the first
as a card, with versions and config), OUTPUT/<layout>/ its rollouts, config and log. With `wandb` in the config the same
goes to W&B, offline without an API key. A table goes to stderr, the last line of stdout is one JSON object.
"""

from __future__ import annotations

# Before torch: it asks which process started this one.
import cpinfer  # isort: skip  # noqa: F401

import argparse
import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from cpinfer.colocate.mismatch import Compared
from cpinfer.colocate.training_logprobs import num_batches_of, training_logprobs
from cpinfer.comm.bootstrap import Launch, default_group, end_with_launcher
from cpinfer.config import config_to_dict
from cpinfer.engine.prompts import InputLine, check_prompt, naming, read_input
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.invariant_training import invariant_training
from cpinfer.models.loading import load_model, load_tokenizer
from cpinfer.models.spec import ModelSpec
from cpinfer_integrations.launching import grid_for, launch_inference
from cpinfer_tools.job import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    NO_REPORTS,
    Parser,
    add_launch_flags,
    check_extras,
    needed_spec,
    needed_weights,
    pool_size,
)
from cpinfer_tools.measuring.harness import Card, machine_name, versions
from cpinfer_tools.progress import Progress, loading
from cpinfer_tools.results.output import default_output, meta_path, summary_path, write_json
from cpinfer_tools.results.output_lock import locked
from cpinfer_tools.run_config import RunConfig, load_run_config
from cpinfer_tools.verify.comparison.generated import generate_samples
from cpinfer_tools.verify.comparison.launches import check_can_launch, interruptible, last_lines, launch, launch_command
from cpinfer_tools.verify.comparison.layouts import AxisSizes, Layout, resolve_layouts
from cpinfer_tools.verify.comparison.mismatches import WHOLE, Logprobs, Row, Sampled, rows_table, verdict
from cpinfer_tools.verify.comparison.report import Section, html_report

ROLLOUT, FORWARD = "cpinfer_tools.rollout", "cpinfer_tools.verify.mismatch"
GENERATE = "Transformers generate"


@dataclass(frozen=True)
class Job:
    """A measurement that is known to be runnable; all of this is worked out before anything is launched."""

    config: RunConfig
    spec: ModelSpec
    layouts: tuple[Layout, ...]
    inputs: tuple[InputLine, ...]
    compared: Compared
    output: Path
    args: argparse.Namespace
    argv: tuple[str, ...]

    @property
    def tp_sizes(self) -> list[int]:
        """Degrees of tensor parallelism, above 1."""
        return sorted({layout.sizes.tp_size for layout in self.layouts} - {1})

    def rollouts(self, layout: Layout) -> Path:
        """Where a layout's samples go."""
        return self.output / layout.name / "rollouts.jsonl"


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="as of cpinfer rollout")
    parser.add_argument(
        "--layouts", nargs="+", metavar="NAME", help="names such as tp4_pcp2_dcp4, or configs; default: the config's"
    )
    add_launch_flags(parser, each="each layout's rollouts")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="samples per call of the forward, and of generate (default: 8)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in a folder that exists")
    parser.add_argument("--forward-worker", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    os.environ.setdefault(*NO_REPORTS)
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        try:
            args = parse_args(argv, prog)
            if args.forward_worker is not None:
                return run_forward(Path(args.forward_worker))
            job = prepare(args, sys.argv[1:] if argv is None else argv)
            if args.dry_run:
                return tell_plan(job)
            stack.enter_context(locked(job.output / "mismatch.json"))
        except UserError as error:
            print(f"mismatch: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        code = interruptible("mismatch", lambda: measure(job))
        return EXIT_FAILURE if code is None else code


def prepare(args: argparse.Namespace, argv: Sequence[str]) -> Job:
    """Check everything that can be checked before the first launch. UserError says what is wrong."""
    output = Path(args.output) if args.output else default_output(args.config, _now()).parent
    instead = "Replace what is in it with --overwrite, or name another."
    check_can_launch(os.environ, args.launcher, output, args.timeout_s, may_exist=args.overwrite, instead=instead)
    config = load_run_config(args.config, args.set)
    spec = needed_spec(config, args.config)
    if config.input is None:
        raise UserError(f'config {args.config}: "input" is missing; give it there or with --set input=FILE.')
    needed_weights(config)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1.")
    own = AxisSizes(config.tp_size, config.pcp_size, config.dcp_size, config.data_parallel_size or 1)
    layouts = resolve_layouts(args.layouts or [own.name], _shared(config), Path(args.config).parent, spec, at_least=1)
    wandb = None if args.no_wandb else config.wandb
    for layout in layouts:
        check_extras(replace(layout.config, wandb=wandb), args.config)
        if (layout.config.dtype, layout.config.sampling) != (config.dtype, config.sampling):
            raise UserError(
                f'layout "{layout.name}" has a dtype or sampling of its own; the forward is called once for all. '
                "Take the keys out of its config."
            )
    inputs = _read_input(config, spec, layouts)
    return Job(config, spec, tuple(layouts), tuple(inputs), Compared.of(config.sampling), output, args, tuple(argv))


def measure(job: Job) -> int:
    """Sample, call the forwards over all of it, write what follows."""
    started_s = time.perf_counter()
    for number, layout in enumerate(job.layouts, start=1):
        name = f"[{number}/{len(job.layouts)}] {layout.name}"
        print(f"mismatch: {name}: {layout.sizes.world_size} process(es)", file=sys.stderr, flush=True)
        output = job.rollouts(layout)
        output.parent.mkdir(parents=True, exist_ok=True)
        config = output.with_name("rollouts.config.json")
        write_json(config, layout.data)
        arguments = ["--config", str(config), "--output", str(output), "--overwrite"]
        arguments += ["--log-level", job.args.log_level]
        _launch(job, ROLLOUT, layout.sizes.world_size, arguments, output.with_suffix(".log"))
    sampled = {layout.name: Sampled.read(job.rollouts(layout), job.compared) for layout in job.layouts}
    rows = judge(job, sampled, {tp_size: sharded_forward(job, tp_size) for tp_size in job.tp_sizes})
    summary = write_results(job, rows)
    if not job.args.no_wandb:
        complaint = log_to_wandb(job, rows)
        if complaint is not None:
            print(f"mismatch: {complaint}", file=sys.stderr)
    print(f"\n{verdict(rows)}\n\n{rows_table(rows)}\n", file=sys.stderr, flush=True)
    print(json.dumps({**summary, "wall_s": time.perf_counter() - started_s, "report": str(job.output)}), flush=True)
    return EXIT_DONE if summary["ok"] else EXIT_FAILURE


def judge(job: Job, sampled: Mapping[str, Sampled], by_tp: Mapping[int, Mapping[str, Logprobs]]) -> list[Row]:
    """The whole model in this process: its forward over every layout's samples, and over those of `generate`.

    `by_tp`: what the forwards under tensor parallelism said of the samples of their layouts.
    """
    assert job.config.model is not None, "prepare has refused that"
    with loading("mismatch", f"{job.config.model} in {job.config.dtype}", shown=True) as loaded:
        model = load_model(job.config.model, getattr(torch, job.config.dtype), on_read=loaded.on_read)
        model = model.to(Launch().device)
    dtype, config = job.config.dtype, job.config
    is_exact = config.deterministic and not config.sampling.cut_by  # whose logarithm is added to what was sampled
    rows: list[Row] = []
    for layout in job.layouts:
        each, tp_size = sampled[layout.name], layout.sizes.tp_size
        print(f"mismatch: the whole forward over samples of {layout.name}", file=sys.stderr, flush=True)
        whole = _forward(model, each, config, job.compared.temperature, job.args.batch_size)
        is_judged = tp_size == 1 or dtype == "float32"
        exact = is_exact and tp_size == 1
        rows.append(Row.of(layout.name, WHOLE, each, whole, dtype, is_judged=is_judged, is_exact=exact))
        if tp_size > 1:
            own, under = by_tp[tp_size][layout.name], f"tp={tp_size}"
            rows.append(Row.of(layout.name, under, each, own, dtype, is_judged=True, is_exact=is_exact))
            rows.append(Row.of(f"{under} forward", WHOLE, replace(each, logprobs=own), whole, dtype, is_judged=False))
    generated = generate_samples(
        model,
        [line.prompt for line in job.inputs],
        job.config.sampling,
        job.spec,
        temperature=job.compared.temperature,
        batch_size=job.args.batch_size,
    )
    whole = _forward(model, generated, config, job.compared.temperature, job.args.batch_size)
    return [*rows, Row.of(GENERATE, WHOLE, generated, whole, dtype, is_judged=False)]


def tell_plan(job: Job) -> int:
    """What would run: for people, and as the last line of stdout."""
    for layout in job.layouts:
        print(f"mismatch: {layout.name}: {layout.sizes.world_size} process(es)", file=sys.stderr)
    names = [layout.name for layout in job.layouts]
    print(json.dumps({"dry_run": True, "layouts": names, "num_prompts": len(job.inputs)}), flush=True)
    return EXIT_DONE


def sharded_forward(job: Job, tp_size: int) -> dict[str, Logprobs]:
    """The forward under tensor parallelism, on processes of its own, over all samples of the layouts that have it."""
    layouts = [layout for layout in job.layouts if layout.sizes.tp_size == tp_size]
    task, told = job.output / f"forward_tp{tp_size}.json", job.output / f"forward_tp{tp_size}.logprobs.json"
    described = {
        "config": str(job.rollouts(layouts[0]).with_name("rollouts.config.json")),
        "rollouts": {layout.name: str(job.rollouts(layout)) for layout in layouts},
        "batch_size": job.args.batch_size,
        "output": str(told),
    }
    write_json(task, described)
    print(f"mismatch: the forward under tp={tp_size}: {tp_size} processes", file=sys.stderr, flush=True)
    arguments = ["--config", described["config"], "--forward-worker", str(task)]
    _launch(job, FORWARD, tp_size, arguments, task.with_suffix(".log"))
    found: dict[str, Logprobs] = json.loads(told.read_bytes())
    return found


def run_forward(task_file: Path) -> int:
    """One rank of `sharded_forward`."""
    task = json.loads(task_file.read_bytes())
    config, launched = load_run_config(task["config"]), Launch.from_environ(os.environ)
    compared = Compared.of(config.sampling)
    end_with_launcher(os.environ, program="mismatch")
    with default_group(launched, config.collective_timeout_s):
        with loading("mismatch", f"{config.model} in {config.dtype}", shown=launched.rank == 0) as loaded:
            grid = RankGrid(tp_size=launched.world_size)
            model, topology = launch_inference(config, grid, launched.device, loaded.on_read)
        found = {
            name: _forward(
                model, Sampled.read(Path(output), compared), config, compared.temperature, task["batch_size"]
            )
            for name, output in task["rollouts"].items()
        }
        if launched.rank == 0:
            Path(task["output"]).write_text(json.dumps(found), encoding="utf-8")
        topology.close()
    return EXIT_DONE


def _forward(model: Any, sampled: Sampled, config: RunConfig, temperature: float, batch_size: int) -> Logprobs:
    num_batches, shown = num_batches_of(len(sampled.prompts), batch_size), Launch.from_environ(os.environ).rank == 0
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("mismatch", num_batches, "batch", shown=shown))
        counted = model.register_forward_hook(lambda *_: progress.update())
        stack.callback(counted.remove)
        if config.deterministic:
            stack.enter_context(invariant_training(model, config))
        return training_logprobs(
            model, sampled.prompts, sampled.completions, temperature=temperature, batch_size=batch_size, pad_token_id=0
        )


def write_results(job: Job, rows: Sequence[Row]) -> dict[str, Any]:
    """`mismatch.json`, `report.md` and `report.html`; the content of the first."""
    ok = all(row.ok for row in rows)
    sampling = job.config.sampling
    how = "greedy" if sampling.greedy else f"sampled at temperature {sampling.temperature:g}, seed {sampling.seed}"
    text = (
        f"{job.config.model} in {job.config.dtype}, {len(job.inputs)} prompts x {sampling.n}, {how}. Compared: "
        f"{job.compared.why}. Differences in nats, over every sampled token; KL estimates KL(rollout || training)."
    )
    section = Section("Rollouts and the training forward", text, rows_table(rows))
    title = Path(job.args.config).stem
    html = html_report(title, verdict(rows), ok, [section], {})
    (job.output / "report.html").write_text(html, encoding="utf-8")
    command = "cpinfer mismatch " + shlex.join(job.argv)
    told = (section.title, f"{verdict(rows)}\n\n{section.text}\n\n{section.table}")
    card = Card("mismatch", title, command, (told,), config_to_dict(job.config))
    (job.output / "report.md").write_text(card.text(machine_name(), versions()), encoding="utf-8")
    summary = {
        "ok": ok,
        "dtype": job.config.dtype,
        "compared": job.compared.field,
        "temperature": job.compared.temperature,
        "rows": [row.plain() for row in rows],
    }
    write_json(job.output / "mismatch.json", summary)
    return summary


def log_to_wandb(job: Job, rows: Sequence[Row]) -> str | None:
    """A group with a run per layout and one for `generate`, where the config asks for it.

    A sentence for people when W&B could not be reached.
    """
    if job.config.wandb is None:
        return None
    from cpinfer_integrations.wandb import LayoutLog, Table, log_comparison, may_go_online

    plain = [{k: v for k, v in row.plain().items() if not isinstance(v, dict)} for row in rows]
    table = Table(list(plain[0]), [list(row.values()) for row in plain])
    rollouts = {layout.name: job.rollouts(layout) for layout in job.layouts}
    logs = []
    for name in (*rollouts, GENERATE):
        # Of a layout with tensor parallelism the last row is the one against its own forward.
        figures = [row for row in plain if row["name"] == name][-1]
        output = rollouts.get(name)
        meta = json.loads(meta_path(output).read_bytes()) if output else {"config": config_to_dict(job.config)}
        summary = json.loads(summary_path(output).read_bytes()) if output else {}
        logs.append(LayoutLog(name, meta, {**summary, **figures}, {"mismatch": table}))
    files = [job.output / name for name in ("report.html", "report.md", "mismatch.json")]
    has_api_key = may_go_online(os.environ)
    return log_comparison(job.config.wandb, logs, files[0], [*files, *rollouts.values()], has_api_key=has_api_key)


def _shared(config: RunConfig) -> dict[str, Any]:
    """The config as plain data that can be written anywhere, without what is this tool's to do."""
    data = config_to_dict(config)
    del data["output"], data["wandb"]
    assert config.model is not None and config.input is not None, "prepare has refused that"
    if Path(config.model).is_dir():
        data["model"] = str(Path(config.model).resolve())
    data["input"] = str(Path(config.input).resolve())
    return data


def _read_input(config: RunConfig, spec: ModelSpec, layouts: Sequence[Layout]) -> list[InputLine]:
    """The prompts, each of which fits every layout. UserError for the first that does not."""
    assert config.model is not None and config.input is not None, "prepare has refused that"
    tokenizer = load_tokenizer(config.model)
    if config.sampling.stop and tokenizer is None:
        raise UserError('"sampling.stop" needs a tokenizer, the model folder has none. Use "stop_token_ids".')
    inputs, complaints = read_input(config.input, tokenizer)
    if complaints:
        raise UserError(f"{complaints[0]} All prompts are needed.")
    for layout in layouts:
        pool = pool_size(spec, grid_for(layout.config, layout.sizes.world_size), layout.config, Launch().device)
        for line in inputs:
            with naming(f'layout "{layout.name}": prompt', line.prompt.index):
                check_prompt(line.prompt, config.sampling, spec, pool)
    return inputs


def _launch(job: Job, module: str, num_ranks: int, arguments: Sequence[str], log: Path) -> None:
    """UserError when it fails, with the end of its log."""
    command = launch_command(job.args.launcher, num_ranks, module, arguments)
    code = launch(command, log, job.args.timeout_s, os.environ).returncode
    if code != 0:
        how = f"did not end within {job.args.timeout_s:g} s" if code is None else f"ended with exit code {code}"
        raise UserError(f"{module} on {num_ranks} process(es) {how}; the end of {log}:\n{last_lines(log)}")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


if __name__ == "__main__":
    sys.exit(main())
