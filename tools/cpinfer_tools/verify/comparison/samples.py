"""What one evaluation leaves behind: a line per sample, and a summary beside them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cpinfer.errors import UserError
from cpinfer_tools.results.output import summary_path

# greedy: temperature 0, where layouts must give the same tokens. sampled: the config's own sampling.
Pass = Literal["greedy", "sampled"]


class SampleKey(NamedTuple):
    """Which sample of a task set a line holds: the same key means the same prompt in every layout."""

    task: str
    length: int  # 0 where a file's questions keep their own
    depth: float | None
    seed: int
    sample_index: int

    def __str__(self) -> str:
        length = f", length {self.length}" if self.length else ""
        depth = "" if self.depth is None else f", depth {self.depth:g}"
        return f"task {self.task}{length}{depth}, seed {self.seed}, sample {self.sample_index}"


@dataclass(frozen=True)
class Sample:
    """One answer: its tokens, the raw log-probability of each, and the score its task gives it.

    `scores` has the score by every metric of the task, `metric` and `score` among them.
    """

    key: SampleKey
    metric: str
    score: float
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_num_tokens: int
    scores: Mapping[str, float]

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Sample:
        """A sample from a line of the evaluation's output. KeyError, TypeError, ValueError for what is none."""
        depth = line["depth"]
        key = SampleKey(
            task=str(line["task"]),
            length=int(line["length"]),
            depth=None if depth is None else float(depth),
            seed=int(line["seed"]),
            sample_index=int(line["sample_index"]),
        )
        # JSON has no NaN that every writer agrees on: null stands for one.
        logprobs = tuple(math.nan if value is None else float(value) for value in line["logprobs"])
        tokens = tuple(int(token) for token in line["token_ids"])
        if len(tokens) != len(logprobs):
            raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} logprobs")
        metric, score = str(line["metric"]), float(line["score"])
        scores = {metric: score} | {str(name): float(value) for name, value in line.get("scores", {}).items()}
        return cls(key, metric, score, tokens, logprobs, int(line["prompt_num_tokens"]), scores)


@dataclass(frozen=True)
class Run:
    """One pass of the evaluation over one layout. `samples` is in the order of their keys."""

    layout: str
    passed: Pass
    samples: tuple[Sample, ...]
    summary: Mapping[str, Any]

    @property
    def by_key(self) -> dict[SampleKey, Sample]:
        return {sample.key: sample for sample in self.samples}


def read_run(layout: str, passed: Pass, output: Path) -> Run:
    """The run whose lines lie in `output`. UserError for lines that are not samples, or that come twice."""
    try:
        lines = [json.loads(line) for line in output.read_bytes().splitlines()]
        summary = json.loads(summary_path(output).read_bytes())
        samples = [Sample.from_line(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} holds no evaluation that can be read ({error!r}).") from error
    if summary.get("num_samples") != len(samples):
        raise UserError(f"{output} has {len(samples)} lines, its summary speaks of {summary.get('num_samples')}.")
    samples.sort(key=lambda sample: _order(sample.key))
    twice = [a.key for a, b in itertools.pairwise(samples) if a.key == b.key]
    if twice:
        raise UserError(f"{output} has two lines for {twice[0]}.")
    return Run(layout, passed, tuple(samples), summary)


def runs_of(runs: Sequence[Run], passed: Pass) -> list[Run]:
    return [run for run in runs if run.passed == passed]


def _order(key: SampleKey) -> tuple[Any, ...]:
    return (key.task, key.length, -1.0 if key.depth is None else key.depth, key.seed, key.sample_index)
