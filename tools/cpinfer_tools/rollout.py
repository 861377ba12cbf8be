"""Generate rollouts from a file of prompts: the project's main job.

    deepspeed --num_gpus 8 tools/rollout.py --config configs/pcp2_dcp2.json
    torchrun --nproc-per-node 2 tools/rollout.py --config configs/pcp2.json
    cpinfer rollout --config configs/single.json

Bad config or input is found before any model is loaded (exit 2); any failure ends every rank (exit 1). Progress and a
table go to stderr; the last line that rank 0 writes to stdout is the summary, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial, reduce
from operator import add

import cpinfer
from cpinfer.comm.bootstrap import Launch
from cpinfer.config import SamplingParams
from cpinfer.engine.prompts import InputLine, check_prompt, read_input, sampling_of
from cpinfer.engine.request import Prompt
from cpinfer.engine.scheduler_stats import SchedulerStats
from cpinfer.errors import UserError
from cpinfer.models.loading import load_tokenizer
from cpinfer.models.model_files import model_hashes
from cpinfer_integrations.launching import launch_inference
from cpinfer_tools.job import (
    OutputJob,
    Parser,
    add_common_flags,
    check_layout,
    describe_run,
    gather,
    loading_weights,
    log_to_wandb,
    needed_spec,
    needed_weights,
    of_replica,
    pool_size,
    refuse_bad_lines,
    run_tool,
    tokens_of,
    wanted_output,
)
from cpinfer_tools.progress import Progress
from cpinfer_tools.results.finished import (
    Line,
    SampleKey,
    check_complete,
    numbers_of,
    prompts_hash,
    read_finished,
    rollout_key,
    rollout_lines,
)
from cpinfer_tools.results.metrics import SampleMetrics, format_summary, summarize
from cpinfer_tools.results.output import (
    ResultWriter,
    join_parts,
    part_path,
    summary_path,
    write_json,
)
from cpinfer_tools.run_config import load_run_config


@dataclass(frozen=True, kw_only=True)
class Rollout(OutputJob):
    """Prompts to answer."""

    inputs: tuple[InputLine, ...]
    skipped: tuple[str, ...]

    @property
    def expected(self) -> dict[SampleKey, Line]:
        """The lines that the results file is to hold in the end."""
        return rollout_lines((line.prompt, params.n) for line, params in zip(self.inputs, self.sampling, strict=True))

    @cached_property
    def sampling(self) -> tuple[SamplingParams, ...]:
        """How each line is sampled: as it says itself, else as the config says."""
        return tuple(sampling_of(line.prompt, self.config.sampling) for line in self.inputs)

    def read_done(self) -> frozenset[SampleKey]:
        if self.existing != "resume":
            return frozenset()
        return read_finished(self.output, self.meta, self.expected, rollout_key)

    @property
    def what(self) -> str:
        numbers = {params.n for params in self.sampling}
        if len(numbers) == 1:
            return f"{len(self.inputs)} prompts x {numbers.pop()}"
        return f"{len(self.inputs)} prompts, {len(self.expected)} samples"

    @property
    def counts(self) -> dict[str, int]:
        return {"num_prompts": len(self.inputs)}

    @property
    def notes(self) -> list[str]:
        return [f"skipped: {complaint}" for complaint in self.skipped]


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--input", metavar="FILE", help="prompts, JSON Lines; wins over the config")
    parser.add_argument("--skip-bad-prompts", action="store_true", help="report bad lines of the input, run the rest")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    return run_tool("rollout", lambda launch: prepare(launch, parse_args(argv, prog)), rollout)


def prepare(launch: Launch, args: argparse.Namespace) -> Rollout:
    """Check everything that can be checked without the weights. UserError says what is wrong."""
    config = load_run_config(args.config, args.set)
    config = replace(config, input=args.input or config.input, output=args.output or config.output)
    spec = needed_spec(config, args.config)
    assert config.model is not None
    if config.input is None:
        raise UserError(f'config {args.config}: "input" is missing; give it there or with --input.')
    grid = check_layout(launch, config, spec, args.config)
    weights = needed_weights(config)
    tokenizer = load_tokenizer(config.model)
    pool = pool_size(spec, grid, config, launch.device)

    def refuse_unread_stops(params: SamplingParams) -> None:
        if params.stop and tokenizer is None:
            raise UserError('"sampling.stop" needs a tokenizer, the model folder has none. Use "stop_token_ids".')

    def check(prompt: Prompt) -> None:
        params = sampling_of(prompt, config.sampling)
        refuse_unread_stops(params)
        check_prompt(prompt, params, spec, pool)

    refuse_unread_stops(config.sampling)
    inputs, complaints = read_input(config.input, tokenizer, check, own_sampling=True)
    if not args.skip_bad_prompts:
        refuse_bad_lines(complaints, "Fix the input, or pass --skip-bad-prompts to run the rest.")
    if not inputs:
        raise UserError(f"input {config.input}: no line can be run. {complaints[0]}")
    output, existing = wanted_output(config, args, grid, launch.rank)
    prompts = prompts_hash(line.prompt for line in inputs)
    made_of = {**numbers_of(config), "prompts": prompts, **model_hashes(config.model)}
    return Rollout(
        config=config,
        spec=spec,
        weights=weights,
        grid=grid,
        tokenizer=tokenizer,
        inputs=tuple(inputs),
        skipped=tuple(complaints),
        output=output,
        existing=existing,
        meta=describe_run(config, grid, launch, made_of),
        dry_run=args.dry_run,
        log_level=args.log_level,
    )


def rollout(launch: Launch, job: Rollout) -> None:
    """Load, generate, write. Collective over all ranks."""
    with ExitStack() as stack:
        with loading_weights("rollout", job, launch) as loaded:
            model, topology = launch_inference(job.config, job.grid, launch.device, loaded.on_read)
        stack.callback(topology.close)
        engine = stack.enter_context(cpinfer.attach(model, topology, job.config, tokenizer=job.tokenizer))
        start_s = time.perf_counter()
        samples = _generate(engine, topology, job)
        wall_s = time.perf_counter() - start_s
        # Ranks of one replica hold the same; its writer speaks for it.
        told = gather(launch, (samples, engine.stats) if topology.is_writer else ([], SchedulerStats()))
        capacity = engine.kv_capacity_tokens
    if launch.rank > 0:
        return
    join_parts(job.output, rollout_key, job.grid.dp_size)
    num_samples = check_complete(job.output, job.expected, rollout_key)
    summary = {
        **summarize([sample for part, _ in told for sample in part], len(job.inputs), wall_s),
        "num_samples": num_samples,
        **asdict(reduce(add, (stats for _, stats in told))),
        "load_s": loaded.load_s,
        "kv_capacity_tokens": capacity,
        "kv_capacity_tokens_total": capacity * job.grid.num_homes * job.grid.dp_size,
        "num_samples_resumed": len(job.done),
        "layout": job.meta["layout"],
        "output": str(job.output),
    }
    write_json(summary_path(job.output), summary)
    log_to_wandb("rollout", job, summary)
    print(format_summary(summary), file=sys.stderr, flush=True)
    print(json.dumps(summary), flush=True)


def _generate(engine: cpinfer.Engine, topology: cpinfer.Topology, job: Rollout) -> list[SampleMetrics]:
    """Run this dp replica's share of the prompts; its first rank writes each sample as it finishes."""
    dp_rank = topology.coords.dp_rank
    share = job.inputs[dp_rank :: job.grid.dp_size]
    answers = {line.prompt.index: line.answer for line in share}
    stream = engine.stream([line.prompt for line in share], job.config.sampling, skip=job.done)
    if not topology.is_writer:
        for _ in stream:
            pass
        return []
    samples = []
    lengths = {line.prompt.index: params for line, params in zip(job.inputs, job.sampling, strict=True)}
    left = [index for index, sample in job.expected if index in answers and (index, sample) not in job.done]
    with (
        ResultWriter(part_path(job.output, dp_rank)) as writer,
        Progress(
            "rollout",
            len(left),
            "sample",
            shown=topology.rank == 0,
            where=of_replica(job.grid),
            tokens=partial(tokens_of, engine),
            most_tokens=sum(lengths[index].max_new_tokens for index in left),
        ) as progress,
    ):
        for result in stream:
            writer.write(result)
            samples.append(SampleMetrics.of(result, answers[result.prompt_index]))
            progress.update()
    return samples


if __name__ == "__main__":
    sys.exit(main())
