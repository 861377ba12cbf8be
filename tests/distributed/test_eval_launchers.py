"""tools/eval_longctx.py under the launchers people use: the answers of one process, and nothing lost by a kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launching import accelerate, deepspeed, launch, torchrun

EVAL = "tools/eval_longctx.py"
ASKED = ["--tasks", "recall_single", "recall_multikey", "--lengths", "256", "512", "--num-samples", "4"]
CONFIG = ["--config", "configs/pcp2.json"]
ONE_PROCESS = ["--set", "prefill_context_parallel_size=1", "--set", "decode_context_parallel_size=1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What one process answers."""
    output = tmp_path_factory.mktemp("alone") / "results.jsonl"
    finished = launch([sys.executable, EVAL, *CONFIG, *ASKED, *ONE_PROCESS, "--output", str(output)], timeout_s=90)
    assert finished.returncode == 0, finished
    return answers(output)


def answers(output: Path) -> dict[Any, Any]:
    """Tokens and score of every sample of a results file, each of which must stand there once."""
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    found = {
        (line["task"], line["length"], line["sample_index"], line["seed"]): (line["token_ids"], line["score"])
        for line in lines
    }
    assert len(found) == len(lines)
    return found


def test_accelerate_launch_gives_the_answers_of_one_process(alone: dict[Any, Any], tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    command = accelerate(2, EVAL, *CONFIG, *ASKED, "--output", str(output))
    finished = launch(command, timeout_s=90, env={"ACCELERATE_USE_CPU": "true"})
    assert finished.returncode == 0, finished
    assert answers(output) == alone and len(alone) == 16
    assert finished.summary["layout"] == {"tp": 1, "pcp": 2, "dcp": 2, "dp": 1, "world_size": 2}
    assert finished.summary["tasks"]["recall_single"]["score"] == 1.0


@pytest.mark.slow
def test_a_run_of_two_replicas_killed_midway_resumes_with_exactly_what_is_missing(
    alone: dict[Any, Any], tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    arguments = [*CONFIG, *ASKED, *ONE_PROCESS, "--set", "max_num_seqs=2", "--output", str(output)]
    killed = launch(torchrun(2, "tests/distributed/failing_eval.py", "kill", *arguments), timeout_s=90)
    assert killed.returncode != 0, killed
    parts = [output, output.with_name("results.jsonl.dp1")]
    before = sum(part.read_bytes().count(b"\n") for part in parts if part.exists())
    assert 0 < before < 16
    with output.open("ab") as file:
        file.write(b'{"task": "a line that the kill tore')
    resumed = launch(torchrun(2, EVAL, *arguments, "--resume"), timeout_s=90)
    assert resumed.returncode == 0, resumed
    assert resumed.summary["num_samples_resumed"] == before
    assert resumed.summary["layout"]["dp"] == 2
    assert answers(output) == alone
    assert not list(tmp_path.glob("*.dp1"))


@pytest.mark.slow
def test_deepspeed_gives_the_answers_of_one_process(alone: dict[Any, Any], tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["--config", "configs/tp2_pcp2_dcp2.json", *ASKED, "--output", str(output)]
    finished = launch(deepspeed(4, EVAL, *arguments), timeout_s=110)
    assert finished.returncode == 0, finished
    assert answers(output) == alone


@pytest.mark.slow
def test_bad_input_on_many_ranks_is_said_once_and_all_exit_2(tmp_path: Path) -> None:
    finished = launch(torchrun(2, EVAL, *CONFIG, "--tasks", "niah_singel_1"), timeout_s=90)
    assert finished.returncode != 0, finished
    assert finished.stderr.count("unknown task") == 1, finished
    assert "eval_longctx: unknown task" in finished.stderr and "exitcode  : 2" in finished.stderr, finished
