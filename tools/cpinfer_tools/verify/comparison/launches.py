"""Running the evaluation of one layout: real processes under a real launcher, bounded in time, none left behind."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal, NoReturn

import psutil

from cpinfer.errors import OutputError, UserError
from cpinfer.packages import need_package
from cpinfer_tools.measuring.harness import free_port

Launcher = Literal["torchrun", "deepspeed"]
# How long a launcher may take to end its processes when it is asked to, before they are killed.
GRACE_S = 10.0
# Launch variables of a job that we may have been started in; a job of our own must not inherit them.
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# What launchers say themselves: torchrun from the first failure on, DeepSpeed line by line.
_TORCHRUNS_END = re.compile(r"[WE]\d{4} \S+ \d+ .*torch/distributed/elastic")
_DEEPSPEEDS = re.compile(r"\[\S+ \S+\] \[\w+\] \[\w+\.py:\d+:")


@dataclass(frozen=True)
class Ended:
    """How a launch ended. `returncode` is that of our processes where the launcher says it, None past the time."""

    returncode: int | None
    wall_s: float


def check_can_launch(
    environ: Mapping[str, str], launcher: Launcher, output: Path, timeout_s: float, *, may_exist: bool, instead: str
) -> None:
    """UserError for a tool that was started under a launcher itself, for a launcher that is not installed, for a time
    limit that is none, and for an `output` folder that holds something it may not; `instead` says what to do then."""
    if launcher == "deepspeed":
        need_package("deepspeed", "--launcher deepspeed")
    if int(environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("it launches processes itself. Start it with python, not under a launcher.")
    if not timeout_s > 0:
        raise UserError(f"--timeout-s {timeout_s} must be above 0.")
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; a folder was wanted.")
    if output.is_dir() and any(output.iterdir()) and not may_exist:
        raise UserError(f"output {output} exists. {instead}")


def launch_command(launcher: Launcher, num_ranks: int, module: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `module` on `num_ranks` processes of this machine."""
    python = sys.executable
    if launcher == "torchrun":
        # --standalone finds a free port by itself.
        start = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        start += ["-m"]
    else:
        start = [python, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_gpus", str(num_ranks)]
        start += ["--master_port", str(free_port()), "--module"]
    return [*start, module, *arguments]


def launch(command: Sequence[str], log: Path, timeout_s: float, environ: Mapping[str, str]) -> Ended:
    """Run a command to its end, copying what it prints to `log` and to our stderr.

    Past `timeout_s`, and when we are interrupted, every process that it started is ended.
    """
    env = {key: value for key, value in environ.items() if key not in _LAUNCH_VARIABLES}
    # Equal for all layouts: launchers choose one thread when there are several processes, and all cores for one.
    env.setdefault("OMP_NUM_THREADS", "1")
    started_s = time.perf_counter()
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None, "it was asked for"
    copier = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    copier.start()
    returncode: int | None = None
    started: set[psutil.Process] = set()
    try:
        while (left_s := timeout_s - (time.perf_counter() - started_s)) > 0 and returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                returncode = process.wait(timeout=min(left_s, 1.0))
            started |= _descendants(process)
    finally:
        # Also after an end of its own: a launcher that was killed leaves its workers.
        end_processes(process, started)
        copier.join(timeout=GRACE_S)
    if returncode:
        returncode = _own_returncode(log) or returncode
    return Ended(returncode, time.perf_counter() - started_s)


def end_processes(process: subprocess.Popen[bytes], started: set[psutil.Process]) -> None:
    """End a launcher and all that it `started`, politely, then not.

    Launchers give their workers sessions of their own, so a signal to the launcher's process group does not reach
    them. psutil knows a process by its start time too, so that no stranger with the same number is met.
    """
    if process.poll() is None:
        started = started | _descendants(process)
        process.terminate()
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    alive = psutil.wait_procs(list(started), timeout=1.0)[1]
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=1.0)


def _descendants(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside the block an end from outside is an interrupt, so that it ends the processes of a launch too."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interruptible(tool: str, act: Callable[[], int], instead: str = "") -> int | None:
    """What `act` returns; None where it could not end, for a reason or an interrupt that people are then told of.

    `instead` is what to do after an interrupt.
    """
    try:
        with sigterm_interrupts():
            return act()
    except (UserError, OutputError, OSError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" ".join(filter(None, (f"{tool}: interrupted.", instead))), file=sys.stderr)
    return None


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log, for people: of what our processes said, where they said anything, else of the launcher's."""
    lines = [line.rpartition("\r")[2].rstrip() for line in log.read_text(errors="replace").split("\n")]
    lines = [line for line in lines if line]
    ours = list(itertools.takewhile(lambda line: not _TORCHRUNS_END.match(line), lines))
    ours = [line for line in ours if not _DEEPSPEEDS.match(line)]
    return "\n".join((ours or lines)[-count:])


def _copy(source: IO[bytes], log: Path) -> None:
    with log.open("wb", buffering=0) as copy:
        while chunk := source.read(4096):
            copy.write(chunk)
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()


def _own_returncode(log: Path) -> int | None:
    """torchrun exits with 1 whatever its workers exited with, but says what the first that failed exited with."""
    _, _, cause = log.read_text(errors="replace").rpartition("Root Cause (first observed failure):")
    found = re.search(r"^\s*exitcode\s*:\s*(-?\d+)", cause, re.MULTILINE)
    return int(found[1]) if found else None
