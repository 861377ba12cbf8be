"""The benchmark of starts: what is compared with what, that nothing wrong is timed, and (slow) that it runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import starts
from cpinfer_tools import cli
from cpinfer_tools.measuring.harness import WorkersFailedError
from starts import DEEPSPEED, EXPLAIN, IMPORTS, LAUNCHER, OURS, TRANSFORMERS, Start

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.mark.parametrize("num_ranks", starts.LAYOUTS)
def test_each_layout_has_as_many_ranks_as_are_started(num_ranks: int) -> None:
    layout = json.loads((starts.CONFIGS / starts.LAYOUTS[num_ranks]).read_text(encoding="utf-8"))
    tp_size = layout.get("tensor_parallel", {"tp_size": 1})["tp_size"]
    assert tp_size * layout["prefill_context_parallel_size"] == num_ranks
    # Of a layout for which a rollout needs no DeepSpeed, the floor is a job without it.
    assert starts.floor_of(starts.ways_of(num_ranks)) == (TRANSFORMERS if tp_size == 1 else DEEPSPEED)


def test_a_quick_run_is_one_round_of_two_ranks_and_launchers_may_add_a_local_rank() -> None:
    args = starts.parse_args(["--quick", "--local_rank=1", "--ranks", "8"])
    assert (args.ranks, args.rounds) == ([2], 1)
    assert starts.parse_args([]).ranks == [2, 8]


def say_ready(folder: Path, *said: tuple[float, float]) -> None:
    for rank, each in enumerate(said):
        (folder / f"ready{rank}").write_text(json.dumps(each), encoding="utf-8")


def test_the_last_rank_counts_and_processors_are_those_of_all(tmp_path: Path) -> None:
    say_ready(tmp_path, (107.0, 2.0), (108.5, 3.0))
    assert starts.start_of(tmp_path, 2, 100.0) == Start(ready_s=8.5, processors_s=5.0)


def test_a_rank_that_never_says_that_it_is_ready_is_no_start(tmp_path: Path) -> None:
    say_ready(tmp_path, (107.0, 2.0), (108.5, 3.0))
    with pytest.raises(WorkersFailedError, match="ready2"):
        starts.start_of(tmp_path, 3, 100.0)


@pytest.mark.parametrize("num_right", [starts.NUM_PROMPTS, starts.NUM_PROMPTS - 1])
def test_a_rollout_with_a_wrong_answer_is_not_timed(num_right: int, tmp_path: Path) -> None:
    told = {"num_prompts": starts.NUM_PROMPTS, "num_answers_retrieved": num_right}
    (tmp_path / "results.jsonl.summary.json").write_text(json.dumps(told), encoding="utf-8")
    if num_right == starts.NUM_PROMPTS:
        starts.check_answers(tmp_path)
        return
    with pytest.raises(WorkersFailedError, match="3 rightly"):
        starts.check_answers(tmp_path)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The one that a rank listens to; afterwards as it was."""
    logger = logging.getLogger("cpinfer.engine.attach")
    level, propagates, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagates, handlers


@pytest.mark.parametrize("said", ["rank 1: attached to a qwen2 model", "rank 1: prepacked the weights"])
def test_a_rollout_is_ready_when_its_engine_is_attached(
    said: str, logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def run(tool: str, arguments: list[str]) -> int:
        given.extend([tool, *arguments])
        logger.debug(said)
        return 0

    monkeypatch.setattr(cli, "run", run)
    ready: list[float] = []
    assert starts.rollout(tmp_path, "some.json", lambda: ready.append(time.monotonic())) == 0
    assert len(ready) == ("attached" in said)
    assert given[:3] == ["rollout", "--config", "some.json"] and str(tmp_path / "results.jsonl") in given


def test_a_rank_of_the_launcher_alone_says_that_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    before_s = time.monotonic()
    assert starts.work({"way": LAUNCHER, "folder": str(tmp_path)}) == 0
    found = starts.start_of(tmp_path, 1, before_s)
    assert 0 <= found.ready_s < 60 and found.processors_s > 0


def test_explain_is_timed_only_where_it_draws_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < starts.explain_s() < 60
    monkeypatch.setattr(starts, "EXPLAIN_COMMAND", ("-c", "print('rank')"))
    with pytest.raises(WorkersFailedError, match="drew no grid"):
        starts.explain_s()
    monkeypatch.setattr(starts, "EXPLAIN_COMMAND", ("-c", "raise SystemExit('no')"))
    with pytest.raises(WorkersFailedError, match="exit code 1"):
        starts.explain_s()


def test_tables_say_each_way_over_the_floor_of_its_layout_and_what_is_over_its_target() -> None:
    two = {LAUNCHER: [Start(2.0, 0.5)], TRANSFORMERS: [Start(8.0, 8.0)], DEEPSPEED: [Start(9.0, 9.0)]}
    eight = {LAUNCHER: [Start(2.0, 0.5)], DEEPSPEED: [Start(20.0, 40.0), Start(22.0, 44.0)]}
    jobs = {2: {**two, OURS: [Start(10.0, 9.0)]}, 8: {**eight, OURS: [Start(21.0, 63.0), Start(23.1, 63.0)]}}
    rows = starts.job_table(jobs).splitlines()
    assert "| 2 | cpinfer rollout | 10.00 s (10.00..10.00, n=1) | 1.25 | 9.00 s (9.00..9.00, n=1) | 1.12 |" in rows
    assert "| 8 | cpinfer rollout | 22.05 s (21.00..23.10, n=2) | 1.05 | 63.00 s (63.00..63.00, n=2) | 1.50 |" in rows
    assert len([row for row in rows if row.startswith(("| 2 ", "| 8 "))]) == 7
    parts = {**{part: [float(at + 1)] for at, part in enumerate(IMPORTS)}, EXPLAIN: [0.25]}
    assert "below 0.3 s |" in starts.part_table(parts) and "**over**" not in starts.part_table(parts)
    assert "below 0.3 s: **over**" in starts.part_table({**parts, EXPLAIN: [0.31]})
    assert starts.summary(jobs, parts)["over_floor"] == {2: 1.25, 8: pytest.approx(1.05)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_run_times_every_way_and_leaves_a_card_only_where_told(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "starts.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["jobs"]["2"].keys() == {LAUNCHER, TRANSFORMERS, DEEPSPEED, OURS}
    assert summary["jobs"]["2"][LAUNCHER]["ready_s"]["median_s"] < summary["jobs"]["2"][OURS]["ready_s"]["median_s"]
    parts = [summary["processor_s"][name]["median_s"] for name in IMPORTS]
    assert parts == sorted(parts)
    assert [Path(summary["card"])] == list(tmp_path.iterdir())
