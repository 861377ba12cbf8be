"""tools/compare.py with real processes: layouts that agree, one that is made to disagree, and an end from outside."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launching import ROOT, Finished, launch

SMALL = [
    "evaluation.lengths=[256]",
    "evaluation.num_samples=2",
    "evaluation.seeds=[0, 1]",
    'evaluation.tasks=["recall_single"]',
]
COMMAND = [sys.executable, "tools/compare.py", "--config", "configs/compare_recall.json", "--layouts", "tp1", "pcp2"]


def compare(output: Path, *arguments: str) -> Finished:
    overrides = [flag for override in SMALL for flag in ("--set", override)]
    return launch([*COMMAND, *overrides, "--output", str(output), *arguments], timeout_s=300)


def alter(results: Path, sample: int, change: Callable[[float], float]) -> dict[str, Any]:
    """A sample of results that were written, in which the second logprob is made another."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in results.read_text().splitlines()]
    lines[sample]["logprobs"][1] = change(lines[sample]["logprobs"][1])
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines[sample]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_two_layouts_agree_and_a_planted_difference_is_found_where_it_lies(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished = compare(output, "--set", "wandb.mode=offline")
    assert finished.returncode == 0 and finished.summary["ok"], finished
    assert [a["num_identical"] for a in finished.summary["agreement"]] == [2, 4]
    assert (output / "report.html").stat().st_size > 10_000
    assert len(list((output / "wandb").glob("offline-run-*"))) == 2

    altered = alter(output / "pcp2" / "greedy.jsonl", -1, lambda logprob: logprob - 0.01)
    planted = compare(output, "--reuse", "--no-wandb")
    assert planted.returncode == 1 and planted.stderr.count(": kept") == 4, planted
    [found] = planted.summary["disagreements"]
    wanted = {"layout": "pcp2", "pass": "greedy", "position": 1, "sample_index": altered["sample_index"]}
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_bit_by_bit_layouts_are_equal_and_a_single_bit_is_found(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished = compare(output, "--bitwise", "--no-wandb")
    assert finished.returncode == 0 and finished.summary["ok"], finished
    assert all(
        a["share_identical"] == 1 and a["max_abs_logprob_difference"] == 0 for a in finished.summary["agreement"]
    )

    alter(output / "pcp2" / "sampled.jsonl", 0, lambda logprob: math.nextafter(logprob, 0))
    planted = compare(output, "--reuse", "--bitwise", "--no-wandb")
    assert planted.returncode == 1 and planted.stderr.count(": kept") == 4, planted
    assert [found["position"] for found in planted.summary["disagreements"]] == [1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_end_from_outside_ends_every_process_of_a_layout(tmp_path: Path) -> None:
    command = [*COMMAND, "--output", str(tmp_path / "out"), "--no-wandb"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ) as tool:
        workers = wait_for_workers(tool.pid)
        tool.send_signal(signal.SIGTERM)
        _, err = tool.communicate(timeout=60)
    assert tool.returncode == 1 and b"interrupted" in err
    assert not [p for p in workers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def wait_for_workers(pid: int) -> list[psutil.Process]:
    """Everything below the tool, once an evaluation runs under its launcher."""
    for _ in range(600):
        below = psutil.Process(pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if sum("eval_longctx" in " ".join(p.cmdline()) for p in below) >= 2:
                return below
        time.sleep(0.1)
    raise AssertionError("no evaluation was started")
