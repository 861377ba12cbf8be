"""Replicas that write one output: what cannot be joined is said before a model is loaded, nothing is lost or mixed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cpinfer_tools.results.output import part_paths
from launching import ROOT, Finished, forked, launch, torchrun

CONFIG = ["--config", str(ROOT / "configs" / "single.json"), "--set", "sampling.max_new_tokens=4"]
ASKED = ["--tasks", "recall_single", "--lengths", "256", "--num-samples", "4"]


def few_prompts(path: Path, n: int = 12) -> str:
    lines = (ROOT / "configs" / "recall-tiny-prompts.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def run(folder: Path, tool: str, *arguments: str, delay_s: float = 0.0) -> Finished:
    script = str(ROOT / "tests" / "distributed" / "rollout_elsewhere.py")
    return forked(2, script, str(folder), str(delay_s), tool, *CONFIG, *arguments, timeout_s=110)


def indices(output: Path) -> list[int]:
    return sorted(json.loads(line)["prompt_index"] for line in output.read_bytes().splitlines())


@pytest.fixture
def two_hosts(tmp_path: Path) -> Path:
    """A folder of its own for each rank: a relative output is another file on each."""
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    return tmp_path


def assert_part_is_not_seen(finished: Finished, two_hosts: Path, tool: str) -> None:
    assert finished.returncode == 2, finished
    assert finished.stderr.count(f"{tool}: rank 1 writes {two_hosts / 'rank1' / 'out.jsonl.dp1'} on ") == 1, finished
    assert f"beside {two_hosts / 'rank0' / 'out.jsonl'} on " in finished.stderr, finished
    assert finished.stdout == "", finished
    assert not list(two_hosts.glob("rank*/*")), "nothing is begun, and nothing is left behind"


def test_an_output_that_the_replicas_do_not_share_is_refused_before_loading(two_hosts: Path) -> None:
    finished = run(two_hosts, "rollout", "--input", few_prompts(two_hosts / "in.jsonl"), "--output", "out.jsonl")
    assert_part_is_not_seen(finished, two_hosts, "rollout")


@pytest.mark.slow
def test_an_evaluation_whose_replicas_share_no_output_is_refused_before_loading(two_hosts: Path) -> None:
    finished = run(two_hosts, "eval", *ASKED, "--output", "out.jsonl")
    assert_part_is_not_seen(finished, two_hosts, "eval_longctx")


@pytest.mark.slow
def test_hosts_whose_inputs_differ_are_refused(two_hosts: Path) -> None:
    for rank in range(2):
        few_prompts(two_hosts / f"rank{rank}" / "in.jsonl", 12 - rank)
    finished = run(two_hosts, "rollout", "--input", "in.jsonl", "--output", str(two_hosts / "out.jsonl"))
    assert finished.returncode == 2, finished
    assert finished.stderr.count("rollout: rank 1 on ") == 1 and "does not have rank 0's prompts" in finished.stderr


def test_a_late_opening_takes_nothing_from_a_replica_that_is_quicker(tmp_path: Path) -> None:
    """With an output of an earlier run to overwrite, a part among it."""
    output = tmp_path / "out.jsonl"
    for name in ("out.jsonl", "out.jsonl.dp1"):
        (tmp_path / name).write_text('{"of": "an earlier run"}\n')
    arguments = ["--input", few_prompts(tmp_path / "in.jsonl"), "--output", str(output), "--overwrite"]
    finished = run(tmp_path, "rollout", *arguments, delay_s=5.0)
    assert finished.returncode == 0, finished
    assert indices(output) == list(range(12)) and finished.summary["num_samples"] == 12


@pytest.mark.slow
def test_a_second_run_at_the_same_moment_is_refused_and_the_first_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier run\n")
    arguments = [*CONFIG, "--input", few_prompts(tmp_path / "in.jsonl"), "--output", str(output), "--overwrite"]
    command = [sys.executable, str(ROOT / "tools" / "rollout.py"), *arguments]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = sorted((process.communicate(timeout=110), process.returncode)[::-1] for process in both)
    assert [code for code, _ in ended] == [0, 2], ended
    assert f"output {output} is being written by another run" in ended[1][1][1] and "Traceback" not in ended[1][1][1]
    assert indices(output) == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["prefill_context_parallel_size=2", "data_parallel_size=2"])
def test_a_full_disk_ends_all_ranks_and_what_was_written_is_continued(tmp_path: Path, layout: str) -> None:
    output = tmp_path / "out.jsonl"
    arguments = [*CONFIG, "--set", layout, "--set", "max_num_seqs=4", "--output", str(output)]
    arguments += ["--input", few_prompts(tmp_path / "in.jsonl", 16)]
    full = launch(torchrun(2, "tests/distributed/failing_rollout.py", "full", *arguments), timeout_s=110)
    assert full.returncode == 1 and full.stdout == "", full
    said = (
        r"rollout: rank \d: output \S+: a line could not be written \(No space left on device\)\. The 2 line\(s\) that"
    )
    assert re.search(said, full.stderr), full
    assert "Traceback" not in full.stderr.split("torch/distributed/elastic")[0], full
    written = b"".join(part.read_bytes() for part in (output, *part_paths(output)))
    assert written.endswith(b"\n") and len([json.loads(line) for line in written.splitlines()]) >= 2
    assert not Path(f"{output}.summary.json").exists()
    resumed = launch(torchrun(2, "tools/rollout.py", *arguments, "--resume"), timeout_s=110)
    assert resumed.returncode == 0 and resumed.summary["num_samples_resumed"] >= 2, resumed
    assert indices(output) == list(range(16)) and resumed.summary["num_samples"] == 16
