"""Starting real processes under real launchers, bounded in time, nothing left behind."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpinfer_tools.verify.comparison.launches import end_processes

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]

ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",
    # As pytest has it, and this checkout's packages before those of any other that is installed.
    "PYTHONPATH": ":".join(str(ROOT / folder) for folder in ("tests", ".", "integrations", "tools")),
}


SCRIPTS = ":".join(str(ROOT / "tests" / folder) for folder in ("distributed", "integrations"))


@dataclass(frozen=True)
class Finished:
    """How a launcher ended, and all it and its processes printed."""

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    returncodes: tuple[int, ...] = ()  # of ranks, where no launcher started them

    @property
    def summary(self) -> dict[str, Any]:
        """The last line of stdout that is a JSON object."""
        lines = [line for line in self.stdout.splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def __str__(self) -> str:
        return f"rc {self.returncode} after {self.wall_s:.0f} s\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(num_ranks: int, *command: str) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc-per-node", str(num_ranks), "--master-port", str(free_port()), *command]


def deepspeed(num_ranks: int, *command: str) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(free_port()), *command]


def accelerate(num_ranks: int, *command: str, route: Sequence[str] = ("--multi_gpu",)) -> list[str]:
    """On CPU the route `--multi_gpu` starts one process unless the environment says ACCELERATE_USE_CPU=true."""
    options = [*route, "--num_processes", str(num_ranks), "--main_process_port", str(free_port())]
    return [str(BIN / "accelerate"), "launch", *options, *command]


def launch(command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command from the repository's root; past the timeout all that it started is ended, and it fails."""
    started_s = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRON, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end_processes(process, set())
        stdout, stderr = process.communicate()
        raise AssertionError(
            f"{' '.join(command)} did not end within {timeout_s:g} s\n{stdout[-3000:]}\n{stderr[-3000:]}"
        ) from None
    finally:
        if process.poll() is None:  # the test's own time was over first
            end_processes(process, set())
    return Finished(process.returncode, stdout, stderr, time.perf_counter() - started_s)


def forked(
    num_ranks: int, script: str, *arguments: str, timeout_s: float, env: Mapping[str, str] | None = None
) -> Finished:
    """`script` on ranks with the environment that torchrun gives them, without its imports: see `fork_server`.

    For what is asked of ranks and not of a launcher. Past the timeout they are ended, and it fails.
    """
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        world = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        job = {"script": script, "arguments": arguments, "num_ranks": num_ranks, "folder": folder}
        server = _fork_server()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps({**job, "env": {**world, **where, **(env or {})}}), file=server.stdin, flush=True)
        ready, _, _ = select.select([server.stdout], [], [], timeout_s)
        line = server.stdout.readline() if ready else ""
        stdout, stderr = (
            "".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob(f"{name}*")))
            for name in ("stdout", "stderr")
        )
        if not line:
            _end(server)
            _fork_server.cache_clear()
            raise AssertionError(
                f"{script} {arguments} did not end within {timeout_s:g} s\n{stdout[-3000:]}\n{stderr[-3000:]}"
            )
    codes = tuple(json.loads(line))
    wall_s = time.perf_counter() - started_s
    return Finished(next((code for code in codes if code), 0), stdout, stderr, wall_s, codes)


@functools.cache
def _fork_server() -> subprocess.Popen[str]:
    """One for all tests of this process."""
    server = subprocess.Popen(
        [sys.executable, "tests/fork_server.py"],
        cwd=ROOT,
        # Scripts find what lies beside them.
        env={**os.environ, **ENVIRON, "PYTHONPATH": f"{ENVIRON['PYTHONPATH']}:{SCRIPTS}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """The server and its ranks, which share its session."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
