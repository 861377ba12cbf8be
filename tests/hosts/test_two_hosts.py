"""A job over two hosts gives what it gives on one, leaves everything once, and ends when a host is lost.

`make hosts`: minutes. Skipped, and said so, where network namespaces are not permitted.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from slow_cable import DELAY_S, LOSS
from two_hosts import (
    MASTER,
    PORT,
    Host,
    deepspeed,
    finish,
    ranks_of,
    slow_cable,
    ssh_between,
    torchrun,
    two_hosts,
    why_no_ssh,
    why_not,
)

from launching import BIN, Finished, launch
from launching import torchrun as torchrun_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROLLOUT = "tools/rollout.py"
CONFIG = ["--config", "configs/tp2_pcp2_dcp2.json"]
WITHIN_S = 240.0
TIMEOUT_S = 5

# Seconds until a host says that nobody listens there.
KNOCK = """
import socket, time
with socket.socket() as knocking:
    start_s = time.monotonic()
    knocking.connect_ex(("10.77.0.2", 9))
    print(time.monotonic() - start_s)
"""

Start = Callable[[int, Path, list[str]], list[str]]


def by_torchrun(host: int, folder: Path, command: list[str]) -> list[str]:
    """tp inside a host, pcp across."""
    return torchrun(host, *command)


def by_deepspeed(host: int, folder: Path, command: list[str]) -> list[str]:
    """The same from a hostfile."""
    hostfile = folder / "hostfile"
    hostfile.write_text("cpi-a slots=2\ncpi-b slots=2\n")
    return deepspeed(host, str(hostfile), *command)


def cyclic(host: int, folder: Path, command: list[str]) -> list[str]:
    """tp across hosts, pcp inside one."""
    return [sys.executable, "tests/hosts/cyclic.py", str(host), *command]


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as both:
        yield both


def run(
    hosts: tuple[Host, Host],
    start: Start,
    folder: Path,
    command: list[str],
    meanwhile: Callable[..., None] | None = None,
) -> list[Finished]:
    processes = [host.start(start(i, folder, command)) for i, host in enumerate(hosts)]
    return finish(processes, WITHIN_S, lambda: meanwhile(processes) if meanwhile else None)


def answers(output: Path) -> list[tuple[int, list[int]]]:
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return sorted((line["prompt_index"], line["token_ids"]) for line in lines)


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[int]]]:
    output = tmp_path_factory.mktemp("one") / "results.jsonl"
    finished = launch(torchrun_here(4, ROLLOUT, *CONFIG, "--output", str(output)), timeout_s=WITHIN_S)
    assert finished.returncode == 0, finished
    return answers(output)


@pytest.mark.parametrize("start", [by_torchrun, by_deepspeed, cyclic], ids=lambda start: start.__name__)
def test_two_hosts_give_the_answers_of_one_and_leave_everything_once(
    start: Start, hosts: tuple[Host, Host], on_one_host: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    wandb = ["--set", 'wandb={"project": "hosts"}', "--set", 'wandb.mode="offline"']
    command = [ROLLOUT, *CONFIG, "--output", str(output), *wandb]
    for finished in run(hosts, start, tmp_path, command):
        assert finished.returncode == 0, finished
    assert answers(output) == on_one_host
    assert sorted(path.name for path in tmp_path.glob("results*")) == [
        "results.jsonl",
        "results.jsonl.meta.json",
        "results.jsonl.summary.json",
    ]
    assert len(list(tmp_path.rglob("offline-run-*"))) == 1

    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:20]))
    a, b = run(hosts, start, tmp_path, [*command, "--resume"])
    assert a.returncode == b.returncode == 0, (str(a), str(b))
    summaries = [line for each in (a, b) for line in each.stdout.splitlines() if '"num_samples_resumed"' in line]
    assert len(summaries) == 1 and '"num_samples_resumed": 20' in summaries[0], (str(a), str(b))
    assert answers(output) == on_one_host


def test_deepspeed_starts_the_other_host_over_ssh(
    hosts: tuple[Host, Host], on_one_host: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    reason = why_no_ssh()
    if reason is not None:
        pytest.skip(reason)
    hostfile, output = tmp_path / "hostfile", tmp_path / "results.jsonl"
    hostfile.write_text("".join(f"{host.address} slots=2\n" for host in hosts))
    where = ["--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", MASTER, "--master_port", str(PORT)]
    command = [str(BIN / "deepspeed"), *where, ROLLOUT, *CONFIG, "--output", str(output)]
    with ssh_between(hosts, tmp_path) as env:
        [finished] = finish([hosts[0].start(command, env)], WITHIN_S, lambda: None)
    assert finished.returncode == 0, finished
    assert answers(output) == on_one_host


def test_the_cable_carries_what_the_axes_count(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = run(hosts, by_torchrun, tmp_path, ["tests/hosts/traffic_worker.py"])
    assert a.returncode == b.returncode == 0, (str(a), str(b))
    told = a.summary
    print(json.dumps(told))
    # TCP/IP, its acknowledgements, gloo's headers, and the small gathers of a call's beginning.
    assert 1.0 <= told["cable_bytes"] / told["expected_bytes"] < 1.25, told


def some_lines(output: Path) -> None:
    """Wait until a run has left a few."""
    until = time.monotonic() + WITHIN_S
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("start", [by_torchrun, by_deepspeed], ids=lambda start: start.__name__)
@pytest.mark.parametrize("fault", ["link down", "host b killed"])
def test_a_host_that_is_lost_ends_the_job_in_bounded_time_and_is_named(
    fault: str, start: Start, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    long = ["--set", "max_num_seqs=1", "--set", f"collective_timeout_s={TIMEOUT_S}"]
    lost_s: list[float] = []

    def lose(processes: Sequence[subprocess.Popen[str]]) -> None:
        some_lines(output)
        if fault == "link down":
            hosts[1].run("ip", "link", "set", "cpi0", "down")
        else:
            for rank in ranks_of(processes[1]):
                rank.kill()
            processes[1].kill()
        lost_s.append(time.monotonic())

    a, b = run(hosts, start, tmp_path, [ROLLOUT, *CONFIG, *long, "--output", str(output)], lose)
    took_s = time.monotonic() - lost_s[0]
    print(fault, start.__name__, f"{took_s:.0f} s")
    assert a.returncode != 0, str(a)
    ends = [line for line in a.stderr.splitlines() if "ends: step" in line]
    assert ends and all("on host cpi-b" in line for line in ends), str(a)
    assert took_s < TIMEOUT_S + 60, (took_s, str(a), str(b))


def test_a_job_goes_on_over_a_slow_cable_that_loses_packets(
    hosts: tuple[Host, Host], on_one_host: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            told = stack.enter_context(slow_cable(*hosts))
        except OSError as error:
            pytest.skip(f"no taps are to be had here: {error}")
        there_and_back_s = float(hosts[0].run(sys.executable, "-c", KNOCK))
        before = told()
        both = run(hosts, by_torchrun, tmp_path, [ROLLOUT, *CONFIG, "--output", str(output)])
        frames = told()
    print(json.dumps({**frames, "there_and_back_s": there_and_back_s, "wall_s": [each.wall_s for each in both]}))
    for finished in both:
        assert finished.returncode == 0, finished
    assert answers(output) == on_one_host
    assert there_and_back_s >= 2 * DELAY_S
    for way in range(2):
        lost, carried = (frames[kind][way] - before[kind][way] for kind in ("lost", "carried"))
        assert carried > 1000 and 0.5 * LOSS < lost / (lost + carried) < 2 * LOSS, frames
