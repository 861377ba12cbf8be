"""The runs of a comparison: for each layout one evaluation, or a greedy and a sampled one, each with its config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpinfer.errors import UserError
from cpinfer.models.model_files import MODEL_PARTS
from cpinfer.models.spec import ModelSpec
from cpinfer_tools.evaluation.questions import evaluation_made_of, make_questions, settled
from cpinfer_tools.job import needed_tokenizer
from cpinfer_tools.results.output import read_meta, summary_path, write_json
from cpinfer_tools.run_config import parse_run_config
from cpinfer_tools.verify.comparison.launches import Ended, Launcher, launch, launch_command
from cpinfer_tools.verify.comparison.layouts import Layout
from cpinfer_tools.verify.comparison.samples import Pass, read_run

MODULE = "cpinfer_tools.evaluation.eval_longctx"


@dataclass(frozen=True)
class Evaluation:
    """One run of `eval_longctx.py`. `data` is its whole config."""

    layout: Layout
    passed: Pass
    data: Mapping[str, Any]
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / f"{self.passed}.config.json"

    @property
    def output(self) -> Path:
        return self.folder / f"{self.passed}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.passed}.log"


def evaluations_of(layout: Layout, output: Path) -> list[Evaluation]:
    """What has to run for one layout: greedy alone, or greedy with the first seed and sampled with all of them."""
    folder = output / layout.name
    evaluation, sampling = layout.data["evaluation"], layout.data["sampling"]
    # Seeds are of sampling: greedy answers are the same under each.
    greedy = {
        **layout.data,
        "sampling": {**sampling, "temperature": 0},
        "evaluation": {**evaluation, "seeds": evaluation["seeds"][:1]},
    }
    runs = [Evaluation(layout, "greedy", greedy, folder)]
    return runs if layout.config.sampling.greedy else [*runs, Evaluation(layout, "sampled", layout.data, folder)]


def contents_of(evaluations: Sequence[Evaluation], spec: ModelSpec) -> dict[Pass, dict[str, Any]]:
    """What the runs of each pass are made of now, as hashes: the files of one config may have changed."""
    found: dict[Pass, dict[str, Any]] = {}
    for evaluation in evaluations:  # layouts share model and tasks
        if evaluation.passed not in found:
            config = settled(parse_run_config(evaluation.data), spec.max_positions)
            made_of = evaluation_made_of(config, make_questions(config, needed_tokenizer(config)))
            found[evaluation.passed] = {name: made_of[name] for name in ("prompts", *MODEL_PARTS)}
    return found


def is_complete(evaluation: Evaluation, contents: Mapping[str, Any]) -> bool:
    """Whether it has run to its end already, with exactly this config and `contents`."""
    try:
        same = json.loads(evaluation.config.read_bytes()) == json.loads(json.dumps(evaluation.data))
        made_of = read_meta(evaluation.output).get("made_of", {})
        same = same and all(made_of.get(name) == value for name, value in contents.items())
        return same and bool(read_run(evaluation.layout.name, evaluation.passed, evaluation.output).samples)
    except (OSError, ValueError, UserError):
        return False


def evaluate(
    evaluation: Evaluation, launcher: Launcher, timeout_s: float, environ: Mapping[str, str], log_level: str
) -> Ended:
    """Run it. What an earlier run left is replaced."""
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    # In this order: a config beside an old summary would look like a complete run.
    summary_path(evaluation.output).unlink(missing_ok=True)
    write_json(evaluation.config, evaluation.data)
    arguments = ["--config", str(evaluation.config), "--output", str(evaluation.output), "--overwrite"]
    arguments += ["--log-level", log_level]
    command = launch_command(launcher, evaluation.layout.sizes.world_size, MODULE, arguments)
    return launch(command, evaluation.log, timeout_s, environ)
