"""Long-context accuracy of a model in a layout: tasks x lengths x samples x seeds.

    accelerate launch --multi_gpu --num_processes 4 tools/eval_longctx.py --config configs/eval_recall.json
    torchrun --nproc-per-node 4 -m cpinfer_tools eval --config F --tasks niah_single_1 vt --lengths 4k 16k
    deepspeed --num_gpus 4 tools/eval_longctx.py --config F --task-file gsm8k.jsonl --seeds 0 1 2 3 4 \\
        --set sampling.temperature=0.6

Tasks are made from a seed with the model's own tokenizer, nothing is downloaded; a length counts the prompt and the
tokens that may be generated. Each seed is one run over all samples; greedy unless the config sets a temperature.

Bad config or input is found before any model is loaded (exit 2); any failure ends every rank (exit 1). Progress and a
table go to stderr; the last line that rank 0 writes to stdout is the summary, one JSON object.
"""

from __future__ import annotations

# Before torch: it asks which process started this one.
import cpinfer  # isort: skip

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cpinfer.comm.bootstrap import Launch
from cpinfer.engine.prompts import check_prompt, naming
from cpinfer_integrations.launching import launch_inference
from cpinfer_tools.evaluation.longctx.tasks import TASKS
from cpinfer_tools.evaluation.questions import (
    DEFAULTS,
    Key,
    Line,
    Question,
    evaluation_made_of,
    known_of,
    line_key,
    make_questions,
    result_line,
    score_table,
    settled,
    summarize_lines,
)
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
    needed_tokenizer,
    needed_weights,
    of_replica,
    pool_size,
    run_tool,
    tokens_of,
    wanted_output,
)
from cpinfer_tools.lengths import parse_length
from cpinfer_tools.progress import Progress
from cpinfer_tools.results.finished import check_complete, read_finished
from cpinfer_tools.results.metrics import format_summary
from cpinfer_tools.results.output import (
    ResultWriter,
    join_parts,
    part_path,
    summary_path,
    write_json,
)
from cpinfer_tools.run_config import EvaluationConfig, load_run_config


@dataclass(frozen=True, kw_only=True)
class EvaluationJob(OutputJob):
    """Questions to ask."""

    questions: tuple[Question, ...]

    @property
    def expected(self) -> dict[Key, Line]:
        """The lines that the results file is to hold in the end."""
        return {question.key: known_of(question) for question in self.questions}

    def read_done(self) -> frozenset[Key]:
        if self.existing != "resume":
            return frozenset()
        return read_finished(self.output, self.meta, self.expected, line_key)

    @property
    def missing(self) -> list[Question]:
        """What no earlier run has answered."""
        return [question for question in self.questions if question.key not in self.done]

    @property
    def what(self) -> str:
        evaluation = self.config.evaluation
        lengths = " ".join(map(str, evaluation.lengths))
        tasks = evaluation.task_file or f"{' '.join(evaluation.tasks)} at {lengths} tokens"
        return f"{tasks}: {len(self.questions)} samples, {len(evaluation.seeds)} seed(s)"

    @property
    def counts(self) -> dict[str, int]:
        return {"num_samples": len(self.questions)}

    @property
    def notes(self) -> list[str]:
        is_repeated = self.config.sampling.greedy and len(self.config.evaluation.seeds) > 1
        return ["greedy answers are the same under every seed"] if is_repeated else []


def parse_args(
    argv: Sequence[str] | None, prog: str | None = None, description: str | None = __doc__
) -> argparse.Namespace:
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "tasks:\n" + "\n".join(f"  {task.name:<16} {task.help}" for task in TASKS.values())
    add_common_flags(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--tasks", nargs="+", metavar="TASK", help="see below; the default is all of them")
    asked.add_argument("--task-file", metavar="FILE", help="JSON Lines: prompt and references, or gsm8k's")
    parser.add_argument(
        "--lengths", nargs="+", metavar="N", help="tokens, as 12000 or 12k; a file's questions keep their own"
    )
    parser.add_argument("--num-samples", type=int, metavar="N", help="for each task and length")
    parser.add_argument("--depths", nargs="+", type=float, metavar="D", help="of needles, in [0, 1]")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="sampling seeds, one run each")
    parser.add_argument("--num-shots", type=int, metavar="N", help="examples before a question of a gsm8k file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    return run_tool("eval_longctx", lambda launch: prepare(launch, parse_args(argv, prog)), evaluate)


def prepare(launch: Launch, args: argparse.Namespace) -> EvaluationJob:
    """Check everything that can be checked without the weights. UserError says what is wrong."""
    config = load_run_config(args.config, args.set, DEFAULTS)
    config = replace(config, output=args.output or config.output, evaluation=with_flags(config.evaluation, args))
    spec = needed_spec(config, args.config)
    grid = check_layout(launch, config, spec, args.config)
    weights = needed_weights(config)
    config = settled(config, spec.max_positions)
    output, existing = wanted_output(config, args, grid, launch.rank)
    tokenizer = needed_tokenizer(config)
    questions = make_questions(config, tokenizer)
    pool = pool_size(spec, grid, config, launch.device)
    for question in questions[: len(questions) // len(config.evaluation.seeds)]:  # other seeds ask the same
        with naming(f"task {question.task.name}, sample", question.sample.sample_index):
            check_prompt(question.prompt, question.sampling(config.sampling), spec, pool)
    meta = describe_run(config, grid, launch, evaluation_made_of(config, questions))
    return EvaluationJob(
        config=config,
        spec=spec,
        weights=weights,
        grid=grid,
        tokenizer=tokenizer,
        questions=tuple(questions),
        output=output,
        existing=existing,
        meta={**meta, "evaluation": meta["config"]["evaluation"]},
        dry_run=args.dry_run,
        log_level=args.log_level,
    )


def with_flags(evaluation: EvaluationConfig, args: argparse.Namespace) -> EvaluationConfig:
    """The config's evaluation, where no flag says otherwise; tasks and a task file take each other's place."""
    given: dict[str, Any] = {}
    if args.tasks is not None:
        given |= {"tasks": tuple(args.tasks), "task_file": None}
    if args.task_file is not None:
        given |= {"tasks": (), "task_file": args.task_file}
    if args.lengths is not None:
        given["lengths"] = tuple(parse_length(text) for text in args.lengths)
    for name in ("depths", "seeds"):
        if getattr(args, name) is not None:
            given[name] = tuple(getattr(args, name))
    for name in ("num_samples", "num_shots"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    return replace(evaluation, **given)


def evaluate(launch: Launch, job: EvaluationJob) -> None:
    """Load, ask, write. Collective over all ranks."""
    with ExitStack() as stack:
        with loading_weights("eval_longctx", job, launch) as loaded:
            model, topology = launch_inference(job.config, job.grid, launch.device, loaded.on_read)
        stack.callback(topology.close)
        engine = stack.enter_context(cpinfer.attach(model, topology, job.config, tokenizer=job.tokenizer))
        start_s = time.perf_counter()
        num_generated = _ask(engine, topology, job)
        wall_s = time.perf_counter() - start_s
        # Ranks of one replica generate the same; its writer speaks for it.
        told = gather(launch, (num_generated if topology.is_writer else 0, peak_memory_bytes(launch.device)))
        capacity = engine.kv_capacity_tokens
    if launch.rank == 0:
        measured = {
            "num_generated_tokens": sum(generated for generated, _ in told),
            "wall_s": wall_s,
            "load_s": loaded.load_s,
            "kv_capacity_tokens": capacity,
            "peak_memory_bytes_per_rank": max(peak for _, peak in told),
        }
        summary = conclude(job, measured)
        scores = {f"score/{name}": task["score"] for name, task in summary["tasks"].items()}
        log_to_wandb("eval_longctx", job, {**summary, **scores})


def conclude(job: EvaluationJob, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Join the results, sum them up in a file and for people, and print the summary as the last line of stdout.

    Scores and times of samples are of all lines, also of resumed ones; tokens and wall time are this run's. OutputError
    when an answer is missing: scores of some are not the evaluation's.
    """
    output = job.output
    join_parts(output, line_key, job.grid.dp_size)
    check_complete(output, job.expected, line_key)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    wall_s = measured["wall_s"]
    summary = {
        **summarize_lines(lines),
        **measured,
        "tokens_per_s": measured["num_generated_tokens"] / wall_s if wall_s > 0 else None,
        "num_samples_resumed": len(job.done),
        "layout": job.meta["layout"],
        "output": str(output),
    }
    write_json(summary_path(output), summary)
    plain = {key: value for key, value in summary.items() if key != "tasks"}
    print(score_table(summary), format_summary(plain), sep="\n\n", file=sys.stderr, flush=True)
    print(json.dumps(summary), flush=True)
    return summary


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _ask(engine: cpinfer.Engine, topology: cpinfer.Topology, job: EvaluationJob) -> int:
    """Run this dp replica's share of the questions; its first rank writes each answer as it comes. Tokens generated."""
    dp_rank = topology.coords.dp_rank
    share = job.missing[dp_rank :: job.grid.dp_size]
    by_index = {question.index: question for question in share}
    stream = engine.stream([q.prompt for q in share], [q.sampling(job.config.sampling) for q in share])
    num_generated = 0
    with ExitStack() as stack:
        writer = stack.enter_context(ResultWriter(part_path(job.output, dp_rank))) if topology.is_writer else None
        progress = Progress(
            "eval_longctx", len(share), "sample", shown=topology.rank == 0, where=of_replica(job.grid),
            tokens=partial(tokens_of, engine), most_tokens=sum(q.sample.max_new_tokens for q in share),
        )  # fmt: skip
        stack.enter_context(progress)
        for result in stream:
            num_generated += len(result.token_ids)
            if writer is not None:
                writer.write_line(result_line(by_index[result.prompt_index], result))
            progress.update()
    return num_generated


if __name__ == "__main__":
    sys.exit(main())
