"""What a comparison finds, as one value, and where it is written: files first, then W&B."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpinfer.models.spec import ModelSpec
from cpinfer_tools.results.output import meta_path, write_json
from cpinfer_tools.run_config import RunConfig
from cpinfer_tools.verify.comparison.agreement import Agreement, Disagreement, agree, all_logprob_differences
from cpinfer_tools.verify.comparison.evaluations import Evaluation
from cpinfer_tools.verify.comparison.layouts import Layout
from cpinfer_tools.verify.comparison.plots import draw_all, svg_of
from cpinfer_tools.verify.comparison.report import Section, html_report, markdown_report
from cpinfer_tools.verify.comparison.samples import Pass, Run, runs_of
from cpinfer_tools.verify.comparison.tables import (
    AccuracyRow,
    Figure,
    accuracy_rows,
    accuracy_table,
    agreement_table,
    figures,
    figures_table,
)


@dataclass(frozen=True)
class Results:
    """Everything that follows from the runs. `scored` is the pass that accuracy and speed are taken from."""

    config: RunConfig
    layouts: tuple[Layout, ...]
    runs: tuple[Run, ...]
    scored: Pass
    tolerance: float
    by_task: tuple[AccuracyRow, ...]
    by_length: tuple[AccuracyRow, ...]
    agreements: tuple[Agreement, ...]
    figures: tuple[Figure, ...]

    @classmethod
    def of(
        cls, config: RunConfig, spec: ModelSpec, layouts: Sequence[Layout], runs: Sequence[Run], tolerance: float,
        num_workers: int,
    ) -> Results:  # fmt: skip
        """The first layout is the reference; `num_workers` compute at once on this machine."""
        passes: list[Pass] = list(dict.fromkeys(run.passed for run in runs))
        scored = passes[-1]  # sampled, where there is such a pass
        agreements = []
        for passed in passes:
            reference, *others = runs_of(runs, passed)
            agreements += [agree(reference, other, tolerance) for other in others]
        of_scored = runs_of(runs, scored)
        return cls(
            config=config,
            layouts=tuple(layouts),
            runs=tuple(runs),
            scored=scored,
            tolerance=tolerance,
            by_task=tuple(accuracy_rows(of_scored)),
            by_length=tuple(accuracy_rows(of_scored, by_length=True)),
            agreements=tuple(agreements),
            figures=tuple(figures(of_scored, layouts, spec, num_workers)),
        )

    @property
    def reference(self) -> str:
        return self.layouts[0].name

    @property
    def names(self) -> list[str]:
        return [layout.name for layout in self.layouts]

    @property
    def disagreements(self) -> list[Disagreement]:
        return [disagreement for agreement in self.agreements for disagreement in agreement.disagreements]

    @property
    def ok(self) -> bool:
        return not self.disagreements

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.ok:
            found = self.disagreements
            where = ", ".join(dict.fromkeys(d.layout for d in found))
            return f"DISAGREEMENT with {self.reference}: {where} ({len(found)} places; the first: {found[0]})."
        worst = max((a.max_abs_logprob_difference or 0.0 for a in self.agreements), default=0.0)
        same, samples = (sum(getattr(a, k) for a in self.agreements) for k in ("num_identical", "num_samples"))
        return (
            f"All layouts agree with {self.reference}: {same:,} of {samples:,} samples have its tokens, the largest "
            f"logprob difference is {worst:.2g} (tolerance {self.tolerance:g})."
        )


@dataclass(frozen=True)
class Written:
    """Where a comparison lies, and the report as text for people."""

    html: Path
    markdown: Path
    json: Path
    pictures: Mapping[str, Path]
    text: str


def summarize(results: Results, max_disagreements: int) -> dict[str, Any]:
    """The comparison as one JSON object."""
    summary: dict[str, Any] = _finite(
        {
            "ok": results.ok,
            "reference": results.reference,
            "layouts": results.names,
            "tolerance": results.tolerance,
            "accuracy": [asdict(row) for row in results.by_task],
            "agreement": [agreement.plain() for agreement in results.agreements],
            "num_disagreements": len(results.disagreements),
            "disagreements": [d.plain() for d in results.disagreements[:max_disagreements]],
        }
    )
    return summary


def write_results(results: Results, folder: Path, title: str) -> Written:
    """`comparison.json`, `report.html`, `report.md` and `plots/` in `folder`."""
    runs = runs_of(results.runs, results.scored)
    differences = {
        other.layout: [
            step
            for one in results.runs
            if one.layout == other.layout
            for step in all_logprob_differences(_reference_of(results, one.passed), one)
        ]
        for other in runs[1:]
    }
    pictures = draw_all(folder / "plots", runs, differences, results.agreements, results.tolerance)
    sections = _sections(results)
    html, markdown = folder / "report.html", folder / "report.md"
    html.write_text(html_report(title, results.verdict, results.ok, sections, pictures), encoding="utf-8")
    text = markdown_report(title, results.verdict, sections)
    markdown.write_text(text, encoding="utf-8")
    everything = summarize(results, len(results.disagreements)) | _finite(
        {
            "accuracy_by_length": [asdict(row) for row in results.by_length],
            "figures": [asdict(figure) for figure in results.figures],
            "summaries": {f"{run.layout}/{run.passed}": dict(run.summary) for run in results.runs},
        }
    )
    write_json(folder / "comparison.json", everything)
    return Written(html, markdown, folder / "comparison.json", pictures, text)


def log_to_wandb(
    results: Results, evaluations: Sequence[Evaluation], written: Written, environ: Mapping[str, str]
) -> str | None:
    """The same content to W&B, where the config asks for it. A sentence for people when it could not be reached."""
    if results.config.wandb is None:
        return None
    from cpinfer_integrations.wandb import LayoutLog, Table, log_comparison, may_go_online

    tables = {
        "accuracy": Table(
            ("task", "length", "metric", "layout", "score", "stderr_over_seeds", "num_seeds", "num_samples"),
            [
                (row.task, row.length, row.metric, layout, s.mean, s.stderr, s.num_seeds, s.num_samples)
                for row in (*results.by_task, *results.by_length)
                for layout, s in row.scores.items()
            ],
        ),
        "agreement": _as_table(Table, [a.plain() for a in results.agreements]),
        "figures": _as_table(Table, [asdict(figure) for figure in results.figures]),
    }
    images = {f"plots/{path.stem}": path for path in written.pictures.values()}
    logs = []
    for run in runs_of(results.runs, results.scored):
        outputs = [e.output for e in evaluations if e.layout.name == run.layout]
        logs.append(
            LayoutLog(
                name=run.layout,
                meta=json.loads(meta_path(outputs[-1]).read_bytes()) if meta_path(outputs[-1]).exists() else {},
                summary=_finite({**run.summary, **_logged_numbers(results, run.layout)}),
                tables=tables,
                images=images,
            )
        )
    files = [written.html, written.markdown, written.json, *written.pictures.values()]
    files += map(svg_of, written.pictures.values())
    files += [path for e in evaluations for path in (e.config, e.output)]
    return log_comparison(results.config.wandb, logs, written.html, files, has_api_key=may_go_online(environ))


def _sections(results: Results) -> list[Section]:
    seeds = len({sample.key.seed for run in runs_of(results.runs, results.scored) for sample in run.samples})
    how = "greedy" if results.scored == "greedy" else f"sampled at temperature {results.config.sampling.temperature:g}"
    disagreements = tuple(str(d) for d in results.disagreements[:100])
    config = results.config
    facts = f"{config.model} in {config.dtype}, interleave {config.interleave}, block size {config.block_size}"
    sections = [
        Section(
            "Accuracy",
            f"{facts}; {how}, mean over {seeds} seed(s) ± standard error over seeds.",
            accuracy_table(results.by_task, results.names),
        ),
        Section(
            f"Agreement with {results.reference}",
            "Tokens up to where they first differ, logprobs at the positions before. Near-ties are differences that "
            "the tolerance explains.",
            agreement_table(results.agreements, results.reference, results.tolerance),
            disagreements,
        ),
        Section(
            "Speed, capacity, memory",
            f"Of the {results.scored} pass. Each figure stands before its ratio to {results.reference}'s and, in "
            "parentheses, the ratio that is to be expected. Times are those of this machine and what else ran on it.",
            figures_table(results.figures, results.names),
        ),
    ]
    if len({row.length for row in results.by_length}) > 1:
        sections.append(
            Section("Accuracy by length", "The same scores, by tokens of prompt and answer.",
                    accuracy_table(results.by_length, results.names))
        )  # fmt: skip
    return sections


def _reference_of(results: Results, passed: Pass) -> Run:
    return runs_of(results.runs, passed)[0]


def _logged_numbers(results: Results, layout: str) -> dict[str, Any]:
    """A layout's own scores and agreement, flat, so that W&B can chart them."""
    numbers: dict[str, Any] = {"ok": not any(d.layout == layout for d in results.disagreements)}
    for row in results.by_task:
        if layout in row.scores:
            numbers[f"score/{row.task}"] = row.scores[layout].mean
    for agreement in results.agreements:
        if agreement.layout == layout:
            told = ("share_identical", "num_near_ties", "mean_abs_logprob_difference", "max_abs_logprob_difference")
            numbers |= {f"{agreement.passed}/{key}": agreement.plain()[key] for key in told}
    return numbers


def _as_table(table: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = list(rows[0])
    return table(columns, [[row[column] for column in columns] for row in rows])


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null for both."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data
