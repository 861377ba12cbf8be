"""Reinforcement learning with TRL's GRPO, rollouts by cpinfer on the trainer's own weights.

    deepspeed --num_gpus 2 tools/train_grpo.py --config configs/grpo_sentence.json
    torchrun --nproc-per-node 2 -m cpinfer_tools train-grpo --config configs/grpo_sentence.json
    deepspeed --num_gpus 2 tools/train_grpo.py --config configs/grpo_sentence.json \\
        --set training.generator=transformers --beside runs/FIRST/output.jsonl

The input is JSON Lines with `prompt` or `messages`; what else a line has is handed to the reward. Written are a line
per step, a summary, and the curve as PNG, with those of other runs in it (`--beside`).

Bad config or input is found before any model is loaded (exit 2); any failure ends every rank (exit 1). Progress and a
table go to stderr; the last line that rank 0 writes to stdout is the summary, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpinfer.comm.bootstrap import Launch, is_launched
from cpinfer.config import SamplingParams
from cpinfer.engine.prompts import check_prompt, longest_prompt, read_input
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.models.spec import ModelSpec
from cpinfer.packages import need_package
from cpinfer.strict_json import read_text
from cpinfer_tools.grpo.curves import draw_curves, ends, names_of
from cpinfer_tools.grpo.rewards import Reward, find_reward
from cpinfer_tools.grpo.training import Line, Trained, train
from cpinfer_tools.job import (
    OutputJob,
    Parser,
    add_common_flags,
    check_layout,
    describe_run,
    log_to_wandb,
    needed_spec,
    needed_tokenizer,
    needed_weights,
    pool_size,
    refuse_bad_lines,
    run_tool,
    wanted_output,
)
from cpinfer_tools.progress import Progress
from cpinfer_tools.results.metrics import format_summary
from cpinfer_tools.results.output import ResultWriter, summary_path, write_json
from cpinfer_tools.run_config import RunConfig, load_run_config

# What GRPOConfig has of `sampling`: Transformers' generation takes no more of it.
OF_TRAINER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class Training(OutputJob):
    """Rows for TRL, what rewards them, and the steps of other runs to draw `beside`."""

    reward: Reward
    rows: tuple[dict[str, Any], ...]
    beside: dict[Path, list[Line]]

    @property
    def shown_logs(self) -> tuple[str, ...]:
        return ("cpinfer.trl",) if self.log_level == "warning" else ()

    @property
    def what(self) -> str:
        training = self.config.training
        return f"{training.num_steps} steps over {len(self.rows)} prompts, rollouts by {training.generator}"

    @property
    def counts(self) -> dict[str, int]:
        return {"num_prompts": len(self.rows), "num_steps": self.config.training.num_steps}


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, can_resume=False)
    parser.add_argument("--input", metavar="FILE", help="prompts, JSON Lines; wins over the config")
    parser.add_argument("--beside", nargs="+", default=[], metavar="FILE", help="outputs of other runs to draw beside")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    return run_tool("train_grpo", lambda launch: prepare(launch, parse_args(argv, prog)), train_and_write)


def prepare(launch: Launch, args: argparse.Namespace) -> Training:
    """Check everything that can be checked without the weights. UserError says what is wrong."""
    config = load_run_config(args.config, args.set)
    config = replace(config, input=args.input or config.input, output=args.output or config.output)
    spec = needed_spec(config, args.config)
    if config.input is None:
        raise UserError(f'config {args.config}: "input" is missing; give it there or with --input.')
    grid = check_layout(launch, config, spec, args.config)
    _check_training(config, launch.world_size)
    _check_trainer(config, os.environ)
    reward = find_reward(config.training.reward)
    weights = needed_weights(config, in_files=not config.training.fresh_weights)
    tokenizer = needed_tokenizer(config)
    pool = pool_size(spec, grid, config, launch.device)
    _, complaints = read_input(
        config.input,
        tokenizer,
        partial(_check_prompt, config, spec, pool),
        keep_other_keys=True,
    )
    refuse_bad_lines(complaints, "Fix the input.")
    output, existing = wanted_output(config, args, grid, launch.rank)
    return Training(
        config=config,
        spec=spec,
        weights=weights,
        grid=grid,
        tokenizer=tokenizer,
        output=output,
        existing=existing,
        meta=describe_run(config, grid, launch),
        dry_run=args.dry_run,
        log_level=args.log_level,
        reward=reward,
        rows=tuple(_read_rows(Path(config.input))),
        beside={Path(path): _read_lines(Path(path)) for path in args.beside},
    )


def _check_training(config: RunConfig, world_size: int) -> None:
    training, sampling = config.training, config.sampling
    if training.batch_size * world_size % training.num_generations:
        raise UserError(
            f"{world_size} process(es) with batch_size {training.batch_size} make "
            f"{training.batch_size * world_size} samples a step, no multiple of num_generations "
            f"({training.num_generations}). Change one of the three."
        )
    if sampling.greedy:
        raise UserError(
            '"sampling.temperature" is 0: all samples of a group would be alike. Use a temperature above 0.'
        )
    if config.tp_size > 1 and (config.rollout.gather != "tp_shards" or training.zero_stage != 3):
        raise UserError(
            f"tp_size is {config.tp_size}: this tool trains with data parallelism, whose weights are only cut for a "
            'phase under "training.zero_stage": 3 with "rollout.gather": "tp_shards". Use tp_size 1, or those.'
        )


def _check_trainer(config: RunConfig, environ: Mapping[str, str]) -> None:
    """UserError for what DeepSpeed or Transformers' generation would fail at, or leave out without a word."""
    training = config.training
    if training.zero_stage is not None:
        need_package("deepspeed", f"training.zero_stage={training.zero_stage}")
    if training.lora_rank:
        need_package("peft", f"training.lora_rank={training.lora_rank}")
    if training.zero_stage is not None and not is_launched(environ):
        raise UserError(
            f'"training.zero_stage" is {training.zero_stage}, and DeepSpeed needs a launcher also for one process. '
            'Start it with `deepspeed --num_gpus 1`, or set "training.zero_stage" to null.'
        )
    if training.generator == "cpinfer":
        return
    default = SamplingParams()
    for name in (field.name for field in fields(SamplingParams) if field.name not in OF_TRAINER):
        if (value := getattr(config.sampling, name)) != getattr(default, name):
            raise UserError(
                f'"sampling.{name}" is {json.dumps(value)}, which GRPOTrainer does not hand to Transformers\' '
                'generation. Leave it out, or set "training.generator" to "cpinfer".'
            )


def _check_prompt(config: RunConfig, spec: ModelSpec, pool: PoolSize, prompt: Prompt) -> None:
    """UserError for a prompt that can never run. One that is too long can, where rollouts cut it."""
    if config.training.generator == "cpinfer" and config.rollout.overlong_prompts == "truncate_left":
        longest = longest_prompt(config.sampling, spec, pool)
        prompt = replace(prompt, token_ids=prompt.token_ids[-max(longest, 1) :])
    check_prompt(prompt, config.sampling, spec, pool)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows for TRL, of lines that are known to be good."""
    rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    for number, row in enumerate(rows, start=1):
        if "prompt_token_ids" in row:
            raise UserError(f"input {path}: prompt {number} is token ids; TRL wants `prompt` or `messages`.")
        if "messages" in row:
            row["prompt"] = row.pop("messages")
    return rows


def _read_lines(path: Path) -> list[Line]:
    """The steps of another run's output."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--beside {path}: {error}.") from error
    if not lines or not all({"step", "reward", "rollout_s"} <= line.keys() for line in lines):
        raise UserError(f"--beside {path}: this is no output of train_grpo.")
    return lines


def train_and_write(launch: Launch, job: Training) -> None:
    """Train, a line for each step as it comes, then the summary and the curve. Collective over all ranks."""
    start_s = time.perf_counter()
    trained = _train(launch, job)
    if launch.rank > 0:
        return
    summary = summarize_run(job, trained, time.perf_counter() - start_s)
    write_json(summary_path(job.output), summary)
    curve = job.output.with_suffix(".png")
    names = names_of([job.output, *job.beside])
    draw_curves(dict(zip(names, [trained.lines, *job.beside.values()], strict=True)), curve)
    log_to_wandb("train_grpo", job, summary, trained.lines, {"curve": curve})
    print(format_summary(summary), file=sys.stderr, flush=True)
    print(json.dumps(summary), flush=True)


def _train(launch: Launch, job: Training) -> Trained:
    arguments = (job.config, job.rows, job.reward, job.tokenizer, job.output.parent, launch.device)
    if launch.rank > 0:
        return train(*arguments, on_step=lambda line: None)
    with (
        ResultWriter(job.output) as writer,
        Progress("train_grpo", job.config.training.num_steps, "step", shown=True) as progress,
    ):

        def on_step(line: Line) -> None:
            writer.write_line(line)
            progress.update(reward=f"{line['reward']:.3f}")

        return train(*arguments, on_step=on_step)


def summarize_run(job: Training, trained: Trained, wall_s: float) -> dict[str, Any]:
    """What a run came to, units in the keys; the mismatch only where it was measured."""
    first, last = ends(trained.lines)
    mismatch = trained.mismatch
    return {
        "num_steps": len(trained.lines),
        "reward_first": first,
        "reward_last": last,
        "generator": job.config.training.generator,
        "rollout_s_p50": statistics.median(line["rollout_s"] for line in trained.lines),
        "step_s_p50": statistics.median(line["step_s"] for line in trained.lines),
        "wall_s": wall_s,
        **(mismatch.as_dict() if mismatch.num_tokens else {}),
        "layout": job.meta["layout"],
        "output": str(job.output),
    }
