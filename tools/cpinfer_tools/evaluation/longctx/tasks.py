"""The tasks that need no file: their registry, and samples of them.

    samples = make_samples(["niah_single_1", "vt"], lengths=[4096, 8192], num_samples=20, depths=[0, 0.5, 1], tokenizer)

A sample is a function of (seed, task, length, sample_index, tokenizer) alone. The length counts the prompt and the
tokens that may be generated, which is RULER's rule.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpinfer.errors import UserError, quoted
from cpinfer_tools.evaluation.longctx.haystack import Draft, fit
from cpinfer_tools.evaluation.longctx.recall import recall
from cpinfer_tools.evaluation.longctx.ruler import common_words, frequent_words, niah, passkey, variable_tracking

Maker = Callable[[random.Random, int, float | None], Draft]
MANY_RECORDS = 32


@dataclass(frozen=True)
class Sample:
    """One question with what an answer should hold. `length` is 0 where a file sets it, `depth` a share in [0, 1]."""

    task: str
    length: int
    sample_index: int
    depth: float | None
    prompt_token_ids: tuple[int, ...]
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Task:
    """What is asked. `metrics`: the first one counts. `draft(rng, length, depth)`; None where samples come from a file.

    `has_depth`: one needle is asked for, and lies at the depth that the sample's place on the grid says.
    """

    name: str
    help: str
    max_new_tokens: int
    draft: Maker | None
    has_depth: bool = False
    metrics: tuple[str, ...] = ("string_match_all",)
    stop: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return self.metrics[0]


_REGISTERED = (
    Task(
        "niah_single_1",
        "RULER: one number in repeated noise sentences",
        128,
        lambda rng, length, depth: niah(rng, depth, "noise"),
        has_depth=True,
    ),
    Task(
        "niah_multikey_2",
        "RULER: one number in a haystack of such needles",
        128,
        lambda rng, length, depth: niah(rng, depth, "needles"),
        has_depth=True,
    ),
    Task(
        "niah_multikey_3",
        "RULER: one uuid, named by a uuid, in a haystack of such needles",
        128,
        lambda rng, length, depth: niah(rng, depth, "needles", "uuids", "uuids"),
        has_depth=True,
    ),
    Task(
        "niah_multivalue",
        "RULER's multivalue (four numbers of one key) on a synthetic haystack, not on its essays",
        128,
        lambda rng, length, depth: niah(rng, depth, "synthetic", num_values=4),
    ),
    Task(
        "niah_multiquery",
        "RULER's multiquery (four keys, all asked for) on a synthetic haystack, not on its essays",
        128,
        lambda rng, length, depth: niah(rng, depth, "synthetic", num_queries=4),
    ),
    Task("vt", "RULER: variable tracking, one chain of 4 hops", 30, lambda rng, length, depth: variable_tracking(rng)),
    Task("cwe", "RULER: the ten common words of a list", 120, lambda rng, length, depth: common_words(rng, length)),
    Task(
        "fwe", "RULER: the three most frequent coded words", 50, lambda rng, length, depth: frequent_words(rng, length)
    ),
    Task(
        "passkey",
        "a pass key in noise (Landmark Attention)",
        16,
        lambda rng, length, depth: passkey(rng, depth),
        has_depth=True,
    ),
    Task(
        "recall_single",
        "synthetic, made for the shipped recall models: one record in filler",
        4,
        lambda rng, length, depth: recall(rng, depth, 1),
        has_depth=True,
    ),
    Task(
        "recall_multikey",
        f"synthetic, made for the shipped recall models: {MANY_RECORDS} records in filler, one asked for",
        4,
        lambda rng, length, depth: recall(rng, depth, MANY_RECORDS),
        has_depth=True,
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _REGISTERED}


def find_task(name: str) -> Task:
    """UserError, naming the nearest, for a task that there is not."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)
        raise UserError(f'unknown task {quoted(name)}; the nearest is "{near[0]}". There are {", ".join(TASKS)}.')
    return TASKS[name]


def make_samples(
    tasks: Sequence[str],
    lengths: Sequence[int],
    num_samples: int,
    depths: Sequence[float],
    tokenizer: Any,
    seed: int = 0,
) -> list[Sample]:
    """`num_samples` of each task at each length; sample i lies at depth `depths[i % len(depths)]`.

    UserError for an unknown task, a budget too small for a template, and a tokenizer that cannot hit a budget.
    """
    found = [find_task(name) for name in tasks]
    return [
        make_sample(task, length, index, depths, tokenizer, seed)
        for task in found
        for length in lengths
        for index in range(num_samples)
    ]


def make_sample(
    task: Task, length: int, sample_index: int, depths: Sequence[float], tokenizer: Any, seed: int = 0
) -> Sample:
    """One sample. UserError as `make_samples` has it."""
    assert task.draft is not None, "a task without a draft has its samples in a file"
    depth = float(depths[sample_index % len(depths)]) if task.has_depth and depths else None
    draft = task.draft(random.Random(f"{seed} {task.name} {length} {sample_index}"), length, depth)
    try:
        prompt, ids = fit(draft, tokenizer, length - task.max_new_tokens)
    except UserError as error:
        raise UserError(
            f"task {task.name} at length {length}, of which {task.max_new_tokens} tokens are for the answer: {error}."
        ) from error
    return Sample(task.name, length, sample_index, depth, ids, prompt, draft.references, task.max_new_tokens)
