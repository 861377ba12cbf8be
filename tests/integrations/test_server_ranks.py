"""Two ranks compute what one answers: agents of both, errors of one, a rank that dies, and how a server ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import num_streamed, wait_until

from cpinfer_tools.verify.comparison.launches import end_processes
from launching import ROOT, accelerate, deepspeed, forked, free_port, torchrun

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
    found = finished.summary
    assert found["status"] == 503, finished
    for error in (json.loads(found["last"].removeprefix("data: "))["error"], found["error"]):
        assert error["type"] == "server_error" and "ended because another rank ended" in error["message"], finished


def started(command: list[str], folder: Path, port: int) -> subprocess.Popen[bytes]:
    """`cpinfer serve` under a launcher, when it answers."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with (folder / "stderr").open("w") as stderr, (folder / "stdout").open("w") as stdout:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, env=env)
    until_s = time.monotonic() + 90
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
            return process
        except httpx.TransportError:
            told = (folder / "stderr").read_text()
            assert process.poll() is None and time.monotonic() < until_s, told
            time.sleep(0.1)


def ranks_below(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The ranks that a launcher has started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in below if "RANK" in child.environ()}


def asked(port: int, **body: Any) -> httpx.Response:
    """What a client gets that waits for a whole answer, or for the end of its stream."""
    body = {"prompt": "Recall: Alice", "ignore_eos": True, **body}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)


def events_of(answer: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in answer.text.splitlines() if line]


def wait_for_running(port: int, num_samples: int) -> None:
    line = f"cpinfer_requests_running {num_samples:.1f}"
    wait_until(lambda: line in httpx.get(f"http://127.0.0.1:{port}/metrics").text)


def drained(process: subprocess.Popen[bytes], pid: int, folder: Path, port: int) -> dict[str, Any]:
    """The last line of the tool, which gets a SIGTERM while a client listens; the client gets all of its answer."""
    body = {"prompt": "Recall: Alice", "max_tokens": 300, "ignore_eos": True, "stream": True, "return_token_ids": True}
    try:
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            os.kill(pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and num_streamed([first, *rest]) == 300
        process.wait(60)
    finally:
        end_processes(process, set())
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


def on_two_ranks(port: int, **keys: Any) -> list[str]:
    """The command of the tool, for a launcher of modules."""
    keys = {"tensor_parallel.tp_size": 1, "kv_cache_gib": 0.02, **keys}
    options = [option for name, value in keys.items() for option in ("--set", f"{name}={value}")]
    return ["cpinfer_tools", "serve", "--config", "configs/pcp2.json", "--port", str(port), *options]


def test_under_torchrun_a_sigterm_of_the_first_rank_ends_all_with_0(tmp_path: Path) -> None:
    port = free_port()
    process = started(torchrun(2, "-m", *on_two_ranks(port)), tmp_path, port)
    summary = drained(process, ranks_below(process)[0].pid, tmp_path, port)
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert summary["layout"] == {"tp": 1, "pcp": 2, "dcp": 2, "dp": 1, "world_size": 2}


# How to start a module on two ranks, and what is said of one that was killed.
LAUNCHERS: dict[str, tuple[Callable[..., list[str]], str, str]] = {
    "torchrun": (torchrun, "-m", "Signal 9 (SIGKILL) received by PID {}\n"),
    "deepspeed": (deepspeed, "--module", "exits with return code = -9\n"),
    "accelerate": (accelerate, "-m", "Signal 9 (SIGKILL) received by PID {}\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_a_killed_rank_ends_all_and_clients_get_an_error(
    launcher: str, rank: int, tmp_path: Path
) -> None:
    """Fast tests see the clients of forked ranks, and launchers that end all of a rollout."""
    port = free_port()
    launch, module, said = LAUNCHERS[launcher]
    process = started(launch(2, module, *on_two_ranks(port)), tmp_path, port)
    ranks = ranks_below(process)
    assert ranks.keys() == {0, 1}
    try:
        with ThreadPoolExecutor() as clients:
            asking = [clients.submit(asked, port, max_tokens=20000, stream=stream) for stream in (True, False)]
            wait_for_running(port, 2)
            ranks[rank].kill()
            errors = [client.exception(30) for client in asking]
        process.wait(30)
        assert psutil.wait_procs(ranks.values(), timeout=10)[1] == []
    finally:
        end_processes(process, set(ranks.values()))
    told = (tmp_path / "stdout").read_text() + (tmp_path / "stderr").read_text()
    assert process.returncode != 0 and said.format(ranks[rank].pid) in told, told
    if rank == 0:  # the one that answers
        assert all(isinstance(error, httpx.RemoteProtocolError) for error in errors), errors
        return
    stream, whole = (client.result() for client in asking)
    assert whole.status_code == 503
    for error in (json.loads(events_of(stream)[-1])["error"], whole.json()["error"]):
        assert (
            error["message"] == "the server has ended because another rank ended." and error["type"] == "server_error"
        )


@pytest.mark.slow
def test_what_does_not_end_is_told_so_before_the_launcher_kills_the_server(tmp_path: Path) -> None:
    port = free_port()
    process = started(torchrun(2, "-m", *on_two_ranks(port)), tmp_path, port)
    try:
        with ThreadPoolExecutor() as clients:
            stream = clients.submit(asked, port, max_tokens=20000, stream=True, n=8)
            wait_for_running(port, 8)
            process.terminate()
            last = events_of(stream.result(60))[-1]
        process.wait(30)
    finally:
        end_processes(process, set())
    assert "ending" in json.loads(last)["error"]["message"]
    assert "forcefully" not in (tmp_path / "stderr").read_text()
