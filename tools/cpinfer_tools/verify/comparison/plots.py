"""Pictures of a comparison: where needles are found, accuracy by length, and how far layouts agree.

What a picture shows is worked out by pure functions; drawing is the last step, on matplotlib's Agg canvas, so that no
display is needed and no state is shared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cpinfer_tools.verify.comparison.agreement import Agreement
from cpinfer_tools.verify.comparison.samples import Run, Sample
from cpinfer_tools.verify.comparison.tables import seed_score

DPI = 110
# Readable by the colour-blind (Okabe-Ito), on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Differences of 0 have no logarithm: they are drawn here, left of float32's smallest.
ZERO_DIFFERENCE = 1e-9
MISSING_COLOUR = "#d9d9d9"
# Below it white text is the easier to read on the colour of a score, above it black (contrast as WCAG has it).
DARK_SCORES = 0.47


@dataclass(frozen=True)
class HeatMap:
    """Mean score by needle depth (rows) and length (columns); None where there is no sample."""

    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


def heat_map(samples: Sequence[Sample]) -> HeatMap:
    """Of samples that have a depth; without any, a map without cells."""
    cells: dict[tuple[float, int], list[float]] = {}
    for sample in samples:
        if sample.key.depth is not None:
            cells.setdefault((sample.key.depth, sample.key.length), []).append(sample.score)
    depths = tuple(sorted({depth for depth, _ in cells}))
    lengths = tuple(sorted({length for _, length in cells}))

    def value(depth: float, length: int) -> float | None:
        scores = cells.get((depth, length))
        return statistics.fmean(scores) if scores else None

    return HeatMap(depths, lengths, tuple(tuple(value(d, n) for n in lengths) for d in depths))


def accuracy_by_length(samples: Sequence[Sample]) -> dict[int, tuple[float, float | None]]:
    """For each length the mean score and its standard error over seeds."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        by_length.setdefault(sample.key.length, []).append(sample)
    scores = {length: seed_score(of_length) for length, of_length in sorted(by_length.items())}
    return {length: (score.mean, score.stderr) for length, score in scores.items()}


def needle_tasks(run: Run) -> list[str]:
    """Tasks whose samples say at which depth the needle is."""
    return sorted({sample.key.task for sample in run.samples if sample.key.depth is not None})


def draw_all(
    folder: Path, runs: Sequence[Run], differences: Mapping[str, Sequence[float]], agreements: Sequence[Agreement],
    tolerance: float,
) -> dict[str, Path]:  # fmt: skip
    """Every picture in `folder`, as PNG and SVG; the PNGs by title. `runs` are of one pass, the reference's first."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for task in needle_tasks(runs[0]):
        path = folder / f"heatmap_{task}.png"
        save(_draw_heat_maps(task, runs), path)
        pictures[f"{task}: score by needle depth and length"] = path
    path = folder / "accuracy_by_length.png"
    save(_draw_accuracy(runs), path)
    pictures["Score by length"] = path
    path = folder / "agreement.png"
    save(_draw_agreement(differences, agreements, tolerance), path)
    pictures["Agreement with the reference"] = path
    return pictures


def _draw_heat_maps(task: str, runs: Sequence[Run]) -> Figure:
    maps = [heat_map([sample for sample in run.samples if sample.key.task == task]) for run in runs]
    width = max(2.2, 0.62 * max(len(m.lengths) for m in maps))
    height = max(1.6, 0.42 * max(len(m.depths) for m in maps))
    columns = min(len(runs), 4)
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(width * columns + 1.6, (height + 1.0) * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    image: Any = None
    for axis, run, cells in zip(axes, runs, maps, strict=False):
        image = _draw_heat_map(axis, cells)
        axis.set_title(run.layout, fontsize=10)
    for axis in axes[len(runs) :]:
        axis.set_visible(False)
    figure.supxlabel("prompt and answer, tokens", fontsize=9)
    axes[0].set_ylabel("needle depth")
    figure.suptitle(f"{task}: mean score", fontsize=11)
    colour_bar = figure.colorbar(image, ax=axes, shrink=0.85, label="score")
    show_shares(colour_bar.ax.yaxis)
    return figure


def _draw_heat_map(axis: Axes, cells: HeatMap) -> Any:
    grid = [[math.nan if value is None else value for value in row] for row in cells.values]
    axis.set_facecolor(MISSING_COLOUR)
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    axis.set_xticks(range(len(cells.lengths)), [_kilo(n) for n in cells.lengths], fontsize=8)
    axis.set_yticks(range(len(cells.depths)), [f"{depth:g}" for depth in cells.depths], fontsize=8)
    for y, row in enumerate(cells.values):
        for x, value in enumerate(row):
            text = "-" if value is None else percent(value)
            colour = "white" if value is not None and value < DARK_SCORES else "black"
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    return image


def _draw_accuracy(runs: Sequence[Run]) -> Figure:
    tasks = sorted({sample.key.task for run in runs for sample in run.samples})
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis, task in zip(axes, tasks, strict=False):
        lengths = sorted({s.key.length for run in runs for s in run.samples if s.key.task == task})
        for i, run in enumerate(runs):
            points = accuracy_by_length([sample for sample in run.samples if sample.key.task == task])
            if not points:
                continue
            means, errors = zip(*points.values(), strict=True)
            # Layouts that agree lie on each other: each is drawn thinner than the one below it.
            shrink = 1 - i / (len(runs) + 1)
            axis.errorbar(
                [lengths.index(length) for length in points], means, [error or 0.0 for error in errors],
                color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=run.layout,
                linewidth=6 * shrink, markersize=11 * shrink, capsize=2, elinewidth=1, clip_on=False,
            )  # fmt: skip
        axis.set_xticks(range(len(lengths)), [_kilo(n) for n in lengths], fontsize=8)
        axis.set_ylim(0, 1)
        show_shares(axis.yaxis)
        axis.set_title(task, fontsize=10, pad=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel("prompt and answer, tokens", fontsize=9)
    figure.supylabel("mean score", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_agreement(
    differences: Mapping[str, Sequence[float]], agreements: Sequence[Agreement], tolerance: float
) -> Figure:
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (layout, steps) in enumerate(differences.items(), start=1):
        drawn = sorted(max(step, ZERO_DIFFERENCE) for step in steps if not math.isnan(step))
        shares = [(k + 1) / len(drawn) for k in range(len(drawn))]
        left.step(drawn, shares, where="post", color=COLOURS[i % len(COLOURS)], label=layout)
    left.axvline(tolerance, color="black", linestyle="--", linewidth=1, label="tolerance")
    left.set_xscale("log")
    left.set_xlabel("abs logprob difference of a token (0 drawn at 1e-9)")
    left.set_ylabel("share of tokens at or below")
    left.set_ylim(0, 1)
    show_shares(left.yaxis)
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    shares = [a.share_identical or 0.0 for a in agreements]
    # The number stands with the name: the axis ends where a share does, and a short bar has no room.
    labels = [f"{a.layout}, {a.passed}: {percent(share)}" for a, share in zip(agreements, shares, strict=True)]
    right.barh(labels, shares, color=COLOURS[0])
    right.invert_yaxis()
    right.set_xlim(0, 1)
    show_shares(right.xaxis)
    right.set_xlabel("share of samples with the reference's tokens")
    return figure


def save(figure: Figure, path: Path) -> None:
    """The figure as `path`, a PNG, and as an SVG beside it."""
    FigureCanvasAgg(figure)
    # No date, no version and no random ids inside: the same figures make the same files.
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "cpinfer"}):
        figure.savefig(svg_of(path), facecolor="white", metadata={"Date": None, "Creator": None})


def svg_of(path: Path) -> Path:
    """Where a picture lies as SVG."""
    return path.with_suffix(".svg")


def percent(share: float) -> str:
    """A share as all pictures write it: to a tenth of a percent, 100% and 0% only where that is so.

    >>> percent(1.0), percent(0.9999), percent(2 / 3), percent(0.5), percent(1e-5), percent(0.0)
    ('100%', '99.9%', '66.7%', '50%', '0.1%', '0%')
    """
    if 0 < share < 1:
        share = min(max(share, 0.001), 0.999)
    return f"{round(100 * share, 1):g}%"


def show_shares(axis: Axis) -> None:
    """Label an axis of shares as `percent` has it."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))


def _kilo(tokens: int) -> str:
    if not tokens:
        return "as it is"
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens}"
