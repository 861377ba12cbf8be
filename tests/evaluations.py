"""Evaluation outputs made by hand, with the lines and the summary that `tools/eval_longctx.py` writes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cpinfer_tools.verify.comparison.samples import Pass, Run, Sample

Line = dict[str, Any]


def line(**given: Any) -> Line:
    """One line; what is not given is plain."""
    made = {
        "task": "niah_single_1",
        "length": 1024,
        "sample_index": 0,
        "seed": 0,
        "depth": 0.5,
        "prompt_num_tokens": 1000,
        "references": ["7"],
        "prediction": "7",
        "token_ids": [5, 6, 7],
        "logprobs": [-0.25, -0.5, -0.125],
        "metric": "string_match_all",
        "score": 1.0,
        "finish_reason": "stop",
        "ttft_s": 0.5,
        "tpot_s": 0.01,
    }
    return {**made, **given}


def some_lines(
    tasks: Iterable[str] = ("niah_single_1", "vt"),
    lengths: Iterable[int] = (1024, 4096),
    depths: Iterable[float | None] = (0, 0.5, 1),
    seeds: Iterable[int] = range(5),
    num_samples: int = 2,
) -> list[Line]:
    """A small task set whose scores fall with the length. Always the same."""
    rng = random.Random(0)
    lengths, depths, seeds = list(lengths), list(depths), list(seeds)
    return [
        line(
            task=task,
            length=length,
            depth=depth if task.startswith("niah") else None,
            seed=seed,
            sample_index=index + (0 if task.startswith("niah") else num_samples * i),
            score=float(rng.random() < 2**10 / length + 0.3),
            token_ids=[rng.randrange(100) for _ in range(4)],
            logprobs=[-rng.random() for _ in range(4)],
        )
        for task in tasks
        for length in lengths
        for i, depth in enumerate(depths)
        for seed in seeds
        for index in range(num_samples)
    ]


def summary(**given: Any) -> dict[str, Any]:
    """A summary; what is not given is plain."""
    made = {
        "tasks": {},
        "num_samples": 1,
        "num_generated_tokens": 100,
        "wall_s": 2.0,
        "tokens_per_s": 50.0,
        "ttft_s_p50": 0.5,
        "tpot_s_p50": 0.02,
        "kv_capacity_tokens": 1 << 20,
        "peak_memory_bytes_per_rank": [300_000_000],
        "layout": {"tp": 1, "pcp": 1, "dcp": 1, "dp": 1, "world_size": 1},
    }
    return {**made, **given}


def run(lines: Iterable[Line], layout: str = "tp1", passed: Pass = "greedy", **told: Any) -> Run:
    """The run that such lines make."""
    return Run(layout, passed, tuple(Sample.from_line(data) for data in lines), summary(**told))


def write_run(
    output: Path, lines: Sequence[Line], told: Mapping[str, Any], made_of: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Lines and summary as files."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(data) + "\n" for data in lines), encoding="utf-8")
    output.with_name(output.name + ".summary.json").write_text(
        json.dumps({**told, "num_samples": len(lines)}), encoding="utf-8"
    )
    meta = {"config": {}, "made_of": dict(made_of)}
    output.with_name(output.name + ".meta.json").write_text(json.dumps(meta), encoding="utf-8")


def changed(lines: Iterable[Line], change: Callable[[Line], Line]) -> list[Line]:
    return [change(dict(data)) for data in lines]
