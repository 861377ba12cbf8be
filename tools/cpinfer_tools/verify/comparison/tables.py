"""The tables of a comparison, as plain rows and as Markdown.

Accuracy is in the shape in which it is published: task, metric, the mean over the seeds with its standard error, one
column per layout. Speed and memory stand beside the ratio that is to be expected.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpinfer.layout.explain import Question, explain
from cpinfer.layout.rules import LayoutSizes
from cpinfer.models.spec import ModelSpec
from cpinfer_tools.verify.comparison.agreement import Agreement
from cpinfer_tools.verify.comparison.layouts import Layout
from cpinfer_tools.verify.comparison.samples import Run, Sample

# Capacity depends on the budget only through whole blocks; where the config leaves the budget open, this one is taken.
ANY_KV_CACHE_GIB = 0.25


@dataclass(frozen=True)
class Score:
    """The mean over all seeds, and its standard error; None with one seed, which tells nothing of it."""

    mean: float
    stderr: float | None
    num_seeds: int
    num_samples: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


@dataclass(frozen=True)
class AccuracyRow:
    """One task (of one length, or of all together), its metric and the score of each layout that has it."""

    task: str
    length: int | None
    metric: str
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Figure:
    """One measured figure of one layout, and how it compares with the reference's.

    `expected_ratio` is None where there is no honest number; `why` then says what is to be expected instead.
    """

    layout: str
    name: str
    value: float | None
    ratio: float | None
    expected_ratio: float | None
    why: str


def seed_score(samples: Iterable[Sample], metric: str | None = None) -> Score:
    """Mean over seeds of the mean score of a seed, by the task's first metric or by another one that it has.

    The standard error is that of the seeds' means, `s / sqrt(n)`.
    """
    by_seed: dict[int, list[float]] = {}
    for sample in samples:
        score = sample.score if metric is None else sample.scores[metric]
        by_seed.setdefault(sample.key.seed, []).append(score)
    means = [statistics.fmean(scores) for scores in by_seed.values()]
    stderr = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Score(statistics.fmean(means), stderr, len(means), sum(map(len, by_seed.values())))


def accuracy_rows(runs: Sequence[Run], by_length: bool = False) -> list[AccuracyRow]:
    """A row per task and metric, or per task, length and metric; a layout that has none of it is left out."""
    cells: dict[tuple[str, int | None], dict[str, list[Sample]]] = {}
    for run in runs:
        for sample in run.samples:
            at = (sample.key.task, sample.key.length if by_length else None)
            cells.setdefault(at, {}).setdefault(run.layout, []).append(sample)
    return [
        AccuracyRow(
            task=task,
            length=length,
            metric=metric,
            scores={layout: seed_score(of_layout, metric) for layout, of_layout in samples.items()},
        )
        for (task, length), samples in sorted(cells.items(), key=lambda cell: (cell[0][0], cell[0][1] or 0))
        for metric in next(iter(samples.values()))[0].scores
    ]


def accuracy_table(rows: Sequence[AccuracyRow], layouts: Sequence[str]) -> str:
    """The published shape, as Markdown. A layout without a score has a dash."""
    by_length = any(row.length is not None for row in rows)
    header = ["task", *(["length"] if by_length else []), "metric", *layouts]
    body = [
        [
            row.task,
            *([f"{row.length:,}" if row.length else "as it is"] if by_length else []),
            f"{row.metric}, {_averaged(row)}",
            *(str(row.scores[layout]) if layout in row.scores else "-" for layout in layouts),
        ]
        for row in rows
    ]
    return markdown(header, body, num_left=len(header) - len(layouts))


def agreement_table(agreements: Sequence[Agreement], reference: str, tolerance: float) -> str:
    """Each layout beside the reference, as Markdown."""
    header = ["layout", "pass", "samples", "same tokens", "near-ties", "first difference (median / min)"]
    header += [f"logprobs compared with {reference}", "mean abs difference", "max abs difference", f"≤ {tolerance:g}"]
    body = [
        [
            a.layout,
            a.passed,
            f"{a.num_samples:,}",
            "-" if a.share_identical is None else f"{a.share_identical:.2%}",
            f"{a.num_near_ties:,}",
            "-" if a.first_difference_min is None else f"{a.first_difference_median:g} / {a.first_difference_min}",
            f"{a.num_positions:,}",
            _short(a.mean_abs_logprob_difference),
            _short(a.max_abs_logprob_difference),
            "no" if a.disagreements else "yes",
        ]
        for a in agreements
    ]
    return markdown(header, body, num_left=2)


def figures_table(figures: Sequence[Figure], layouts: Sequence[str]) -> str:
    """A row per figure, a column per layout: measured, its ratio to the reference's, and the expected ratio."""
    at = {(figure.name, figure.layout): figure for figure in figures}
    why = {figure.name: figure.why for figure in figures}
    body = [[name, *(_figure_cell(at[name, layout]) for layout in layouts), why[name]] for name in why]
    header = ["figure: measured, ratio (expected)", *layouts, "what is expected"]
    return markdown(header, body, num_left=1, right_until=1 + len(layouts))


def _figure_cell(figure: Figure) -> str:
    if figure.ratio is None:
        return _short(figure.value)
    expected = "" if figure.expected_ratio is None else f" ({figure.expected_ratio:.2f})"
    return f"{_short(figure.value)}, {figure.ratio:.2f}{expected}"


def figures(runs: Sequence[Run], layouts: Sequence[Layout], spec: ModelSpec, num_workers: int) -> list[Figure]:
    """Speed, capacity and memory of every layout, figure by figure. `runs` are of one pass, the reference's first.

    `num_workers`: devices that compute at once. Layouts do equal work, so ranks beyond these gain nothing.
    """
    busy = {layout.name: min(layout.sizes.world_size, num_workers) for layout in layouts}
    capacity = {layout.name: expected_capacity(layout, spec) for layout in layouts}
    first = runs[0].layout
    found: list[Figure] = []

    def add(name: str, expected: Mapping[str, float] | None, why: str) -> None:
        values = {run.layout: _number(run.summary.get(name)) for run in runs}
        reference = values[first]
        for layout, value in values.items():
            ratio = value / reference if value is not None and reference else None
            found.append(Figure(layout, name, value, ratio, expected[layout] if expected else None, why))

    work = f"equal work over as many ranks as there are workers (at most {num_workers}), nothing for communication"
    add("ttft_s_p50", {name: busy[first] / n for name, n in busy.items()}, work)
    add("tpot_s_p50", {name: busy[first] / n for name, n in busy.items()}, work)
    add("tokens_per_s", {name: n / busy[first] for name, n in busy.items()}, work)
    add("num_generated_tokens", dict.fromkeys(busy, 1.0), "the same text")
    longest = "longest sequence in equal bytes per rank: dcp / stored KV heads, as cpinfer explain has it"
    add("kv_capacity_tokens", {name: tokens / capacity[first] for name, tokens in capacity.items()}, longest)
    memory = "1/tp of the weights and the same KV pool; on a CPU it is the whole process, libraries included"
    add("peak_memory_bytes_per_rank", None, memory)
    return found


def expected_capacity(layout: Layout, spec: ModelSpec) -> int:
    """Tokens of one home's pool, from `cpinfer.layout.explain`; only its ratio to another layout's says something."""
    config, sizes = layout.config, layout.sizes
    answer = explain(
        Question(
            LayoutSizes(
                sizes.tp_size, sizes.pcp_size, sizes.dcp_size, spec.num_q_heads, spec.num_kv_heads, sizes.dp_size,
                config.interleave, config.block_size,
            ),
            num_layers=spec.num_kv_layers,
            kv_head=spec.kv_layout(1),
            dtype=config.dtype,
            cache_dtype=config.cache_dtype(config.dtype),
            kv_cache_gib=config.kv_cache_gib or ANY_KV_CACHE_GIB,
        )
    )  # fmt: skip
    assert answer.kv_capacity_tokens is not None, "layouts are legal, sizes and budget known"
    return answer.kv_capacity_tokens


def markdown(
    header: Sequence[str], body: Sequence[Sequence[str]], num_left: int, right_until: int | None = None
) -> str:
    """A Markdown table; the first `num_left` columns and those from `right_until` on are text, the others numbers."""
    numbers = range(num_left, len(header) if right_until is None else right_until)
    rule = ["---:" if i in numbers else "---" for i in range(len(header))]
    # A bar in a name is no end of its cell.
    rows = ([cell.replace("|", r"\|") for cell in cells] for cells in (header, rule, *body))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _averaged(row: AccuracyRow) -> str:
    return "/".join(f"avg@{n}" for n in sorted({score.num_seeds for score in row.scores.values()}))


def _number(value: Any) -> float | None:
    """A figure of a summary; of one per rank the largest."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return max((float(v) for v in value if v is not None), default=None)
    return None if value is None else float(value)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
