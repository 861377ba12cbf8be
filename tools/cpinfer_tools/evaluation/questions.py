"""An evaluation as data: the questions of a config, the line of an answer, and what all lines come to."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpinfer.config import SamplingParams, config_to_dict
from cpinfer.engine.request import Prompt, RolloutResult
from cpinfer.errors import UserError, quoted
from cpinfer.models.model_files import model_hashes
from cpinfer_tools.evaluation.longctx.local_files import read_task_file
from cpinfer_tools.evaluation.longctx.metrics import METRICS
from cpinfer_tools.evaluation.longctx.tasks import TASKS, Sample, Task, find_task, make_samples
from cpinfer_tools.results.finished import content_hash, numbers_of, whole_number
from cpinfer_tools.run_config import EvaluationConfig, RunConfig

NUM_SAMPLES = 10
# Greedy unless the config says otherwise: an evaluation should give the same answer twice.
DEFAULTS = {"sampling": {"temperature": 0.0}}

Key = tuple[str, int, int, int]
Line = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One sample under one seed; `index` counts them in the order of asking: seed, task, length, sample."""

    index: int
    task: Task
    sample: Sample
    seed: int

    @property
    def key(self) -> Key:
        return self.sample.task, self.sample.length, self.sample.sample_index, self.seed

    @property
    def prompt(self) -> Prompt:
        """For the engine. The id has no seed in it, since the seed goes its own way into the randomness."""
        name = f"{self.sample.task}/{self.sample.length}/{self.sample.sample_index}"
        return Prompt(self.index, name, self.sample.prompt_token_ids)

    def sampling(self, config: SamplingParams) -> SamplingParams:
        """How its answer is to be sampled, in a config that says it in general."""
        stop = tuple(dict.fromkeys((*config.stop, *self.task.stop)))
        return replace(config, seed=self.seed, max_new_tokens=self.sample.max_new_tokens, stop=stop)


def settled(config: RunConfig, max_positions: int) -> RunConfig:
    """The config with nothing of its evaluation left to a default. UserError for what cannot be asked."""
    evaluation = config.evaluation
    if config.sampling.n != 1:
        raise UserError(f'"sampling.n" is {config.sampling.n}; an evaluation asks once per seed. Use "seeds".')
    if evaluation.task_file is not None:
        return config
    too_long = [length for length in evaluation.lengths if length > max_positions]
    if too_long:
        raise UserError(
            f"length {too_long[0]} is more than the model's {max_positions} positions. Ask for fewer tokens, or raise "
            "max_model_len."
        )
    tasks = evaluation.tasks or tuple(TASKS)
    for name in tasks:
        find_task(name)
    num_samples = evaluation.num_samples or NUM_SAMPLES
    return replace(config, evaluation=replace(evaluation, tasks=tasks, num_samples=num_samples))


def make_questions(config: RunConfig, tokenizer: Any) -> list[Question]:
    """All questions of a settled config. UserError, before any model loads, for what cannot be made."""
    evaluation = config.evaluation
    tasks, samples = _samples(config, evaluation, tokenizer)
    asked = [(seed, sample) for seed in evaluation.seeds for sample in samples]
    return [Question(index, tasks[sample.task], sample, seed) for index, (seed, sample) in enumerate(asked)]


def _samples(
    config: RunConfig, evaluation: EvaluationConfig, tokenizer: Any
) -> tuple[Mapping[str, Task], Sequence[Sample]]:
    if evaluation.task_file is None:
        assert evaluation.num_samples is not None, "a settled config"
        depths = evaluation.depths
        return TASKS, make_samples(evaluation.tasks, evaluation.lengths, evaluation.num_samples, depths, tokenizer)
    task, samples = read_task_file(
        evaluation.task_file, tokenizer, config.sampling.max_new_tokens, evaluation.num_samples, evaluation.num_shots
    )
    return {task.name: task}, samples


def result_line(question: Question, result: RolloutResult) -> Line:
    """The line that a results file has of an answer."""
    sample = question.sample
    prediction = result.text or ""
    scores = {metric: METRICS[metric](prediction, sample.references) for metric in question.task.metrics}
    return {
        "task": sample.task,
        "length": sample.length,
        "sample_index": sample.sample_index,
        "seed": question.seed,
        "depth": sample.depth,
        "prompt_num_tokens": len(sample.prompt_token_ids),
        "references": list(sample.references),
        "prediction": result.text,
        "token_ids": list(result.token_ids),
        "logprobs": list(result.logprobs),
        "metric": question.task.metric,
        "score": scores[question.task.metric],
        **({"scores": scores} if len(scores) > 1 else {}),
        "finish_reason": result.finish_reason,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
    }


def line_key(line: Mapping[str, Any]) -> Key:
    """What tells one line of an evaluation from the others. ValueError for a line that has no such key."""
    task = line.get("task")
    if not isinstance(task, str):
        raise ValueError(f'"task" is {quoted(task)}; a text was wanted')
    return task, whole_number(line, "length"), whole_number(line, "sample_index"), whole_number(line, "seed")


def known_of(question: Question) -> Line:
    """What a line holds that is known before it is answered."""
    sample = question.sample
    return {"prompt_num_tokens": len(sample.prompt_token_ids), "references": list(sample.references)}


def evaluation_made_of(config: RunConfig, questions: Sequence[Question]) -> dict[str, Any]:
    """What must be the same in an evaluation and in the one it continues; of a task file the contents, not the path."""
    assert config.model is not None, "prepare has refused that"
    asked = config_to_dict(config)["evaluation"]
    del asked["task_file"]
    hashed = content_hash(_content(question) for question in questions)
    return {**numbers_of(config), "evaluation": asked, "prompts": hashed, **model_hashes(config.model)}


def _content(question: Question) -> list[Any]:
    """All of a question that its answer and its score depend on."""
    sample, task = question.sample, question.task
    return [question.key, sample.prompt_token_ids, sample.references, sample.max_new_tokens, task.stop, task.metrics]


def summarize_lines(lines: Sequence[Line]) -> dict[str, Any]:
    """Scores by task, length and depth, and medians of times, over all lines of a results file.

    A task with several metrics has one entry for each: the first under its own name, others under `task/metric`.
    """
    by_task: dict[str, list[Line]] = defaultdict(list)
    for line in sorted(lines, key=line_key):
        by_task[line["task"]].append(line)
        for metric, score in line.get("scores", {}).items():
            if metric != line["metric"]:
                by_task[f"{line['task']}/{metric}"].append({**line, "metric": metric, "score": score})
    tpots = [line["tpot_s"] for line in lines if line["tpot_s"] is not None]
    return {
        "tasks": {name: _summarize_task(found) for name, found in by_task.items()},
        "num_samples": len(lines),
        "ttft_s_p50": statistics.median(line["ttft_s"] for line in lines) if lines else None,
        "tpot_s_p50": statistics.median(tpots) if tpots else None,
    }


def _summarize_task(lines: Sequence[Line]) -> dict[str, Any]:
    runs = [row["score"] for row in _by(lines, "seed").values()]
    return {
        "metric": lines[0]["metric"],
        "score": _mean(line["score"] for line in lines),
        "stderr_over_seeds": statistics.stdev(runs) / math.sqrt(len(runs)) if len(runs) > 1 else None,
        "by_length": _by(lines, "length"),
        "by_depth": _by([line for line in lines if line["depth"] is not None], "depth"),
    }


def _by(lines: Sequence[Line], field: str) -> dict[str, dict[str, Any]]:
    """Mean score and number of lines for each value of a field, ascending."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for line in lines:
        groups[line[field]].append(line["score"])
    return {str(value): {"score": _mean(groups[value]), "num_samples": len(groups[value])} for value in sorted(groups)}


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def score_table(summary: Mapping[str, Any]) -> str:
    """The scores as lines for people: a row for each task, a column for each length.

    >>> by_length = {"64": {"score": 1.0, "num_samples": 2}, "128": {"score": 0.5, "num_samples": 2}}
    >>> task = {"metric": "m", "score": 0.75, "stderr_over_seeds": 0.25, "by_length": by_length}
    >>> print(score_table({"tasks": {"vt": task}}))
      task  metric  all             64     128
      vt    m       0.750 +- 0.250  1.000  0.500
    """
    tasks = summary["tasks"]
    lengths = sorted({int(length) for task in tasks.values() for length in task["by_length"]})
    rows = [["task", "metric", "all", *(f"{n:,}" if n else "as they are" for n in lengths)]]
    for name, task in tasks.items():
        error = task["stderr_over_seeds"]
        cells = [task["by_length"].get(str(length)) for length in lengths]
        overall = f"{task['score']:.3f}" + (f" +- {error:.3f}" if error is not None else "")
        rows.append([name, task["metric"], overall, *(f"{cell['score']:.3f}" if cell else "-" for cell in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
