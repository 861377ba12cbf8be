"""The curve of a GRPO run, and others of the same kind beside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cpinfer_tools.verify.comparison.plots import COLOURS, save

# Steps at each end of a run whose mean rewards are compared.
END_STEPS = 10

Lines = Sequence[Mapping[str, Any]]


def ends(lines: Lines) -> tuple[float, float]:
    """Mean reward of the first and of the last ten steps, of fewer where there are no twenty.

    >>> ends([{"reward": r} for r in (0.0, 0.5, 1.0)])
    (0.0, 1.0)
    """
    rewards = [line["reward"] for line in lines]
    num = max(1, min(END_STEPS, len(rewards) // 2))
    return statistics.fmean(rewards[:num]), statistics.fmean(rewards[-num:])


def names_of(outputs: Sequence[Path]) -> list[str]:
    """What each run is called: by the folder of its output; where that is not its alone, by the file, too.

    >>> names_of([Path("runs/a/output.jsonl"), Path("runs/b/one.jsonl"), Path("runs/b/two.jsonl")])
    ['a', 'b/one', 'b/two']
    """
    folders = [output.parent.name for output in outputs]
    names = [f if folders.count(f) == 1 else f"{f}/{output.stem}" for f, output in zip(folders, outputs, strict=True)]
    return [name if names.count(name) == 1 else str(output) for name, output in zip(names, outputs, strict=True)]


def draw_curves(runs: Mapping[str, Lines], path: Path) -> None:
    """Reward and seconds per rollout phase over steps, a line for each run by its name: a PNG, an SVG beside it."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    rewards, seconds = figure.subplots(1, 2)
    for (name, lines), colour in zip(runs.items(), COLOURS, strict=False):
        steps = [line["step"] for line in lines]
        rewards.plot(steps, [line["reward"] for line in lines], color=colour, label=name, linewidth=1.2)
        seconds.plot(steps, [line["rollout_s"] for line in lines], color=colour, label=name, linewidth=1.2)
    rewards.set_ylabel("mean reward")
    rewards.set_ylim(-0.03, None)
    seconds.set_ylabel("rollout phase, s")
    seconds.set_ylim(0, None)
    for axes in (rewards, seconds):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    rewards.legend(fontsize=8, frameon=False)
    save(figure, path)
