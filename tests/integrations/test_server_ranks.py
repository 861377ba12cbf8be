"""Two ranks compute what one answers: agents of both, errors of one, and a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from launching import ROOT, forked, free_port, torchrun

WORKER = "tests/integrations/server_worker.py"

pytestmark = pytest.mark.timeout(200)


def ranks_of(case: str) -> list[dict[str, Any]]:
    finished = forked(2, WORKER, case, timeout_s=120)
    assert finished.returncode == 0, finished
    found: list[dict[str, Any]] = finished.summary["ranks"]
    return found


def test_agents_of_all_ranks_get_what_the_engine_gives() -> None:
    first, second = ranks_of("agents")
    assert first["url"] == second["url"]
    for found, num_prompts in ((first, 2), (second, 6)):
        assert len(found["found"]) == num_prompts and found["found"] == found["expected"]
    assert first["alone"] == first["expected"][0] and second["alone"] is None


def test_each_replica_has_a_server_of_its_own() -> None:
    first, second = ranks_of("replicas")
    assert first["url"] != second["url"] and first["found"] == second["found"]


def test_the_error_of_an_agent_is_known_to_all_ranks() -> None:
    first, second = ranks_of("error")
    assert second["said"] == "ValueError: no answer was found"
    assert first["said"] == "UserError: rank 1 could not run its agent: no answer was found"


def test_a_step_that_fails_on_all_ranks_leaves_them_together() -> None:
    assert [found["statuses"] for found in ranks_of("fault")] == [[500, 200], None]


def test_when_a_rank_dies_clients_get_an_error() -> None:
    finished = forked(2, WORKER, "dies", timeout_s=120)
    error = json.loads(finished.summary["last"].removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "the server has ended" in error["message"], finished


def started(command: list[str], folder: Path, port: int) -> subprocess.Popen[str]:
    """`cpinfer serve` under a launcher, when it answers."""
    with (folder / "stderr").open("w") as stderr, (folder / "stdout").open("w") as stdout:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, text=True, start_new_session=True)
    until_s = time.monotonic() + 90
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
            return process
        except httpx.TransportError:
            told = (folder / "stderr").read_text()
            assert process.poll() is None and time.monotonic() < until_s, told
            time.sleep(0.1)


def drained(process: subprocess.Popen[str], pid: int, folder: Path, port: int) -> dict[str, Any]:
    """The last line of the tool, which gets a SIGTERM while a client listens; the client gets all of its answer."""
    body = {"prompt": "Recall: Alice", "max_tokens": 300, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) == 300
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    summary: dict[str, Any] = json.loads((folder / "stdout").read_text().splitlines()[-1])
    return summary


def test_the_tool_drains_on_sigterm_and_ends_with_0(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "cpinfer_tools", "serve", "--config", "configs/single.json", "--port", str(port)]
    process = started(command, tmp_path, port)
    summary = drained(process, process.pid, tmp_path, port)
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert summary["num_generated_tokens"] == 300 and summary["url"] == f"http://127.0.0.1:{port}"
    assert "answers as configs/recall-tiny" in (tmp_path / "stderr").read_text()


def test_under_torchrun_a_sigterm_of_the_first_rank_ends_all_with_0(tmp_path: Path) -> None:
    port = free_port()
    tool = ["-m", "cpinfer_tools", "serve", "--config", "configs/pcp2_dcp2.json"]
    single = ["--set", "tensor_parallel.tp_size=1", "--set", "kv_cache_gib=0.02", "--port", str(port)]
    process = started(torchrun(2, *tool, *single), tmp_path, port)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        pids = [int(pid) for pid in children.read().split()]
    first = next(pid for pid in pids if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes())
    summary = drained(process, first, tmp_path, port)
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert summary["layout"] == {"tp": 1, "pcp": 2, "dcp": 2, "dp": 1, "world_size": 2}
