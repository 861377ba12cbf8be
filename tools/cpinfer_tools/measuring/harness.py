"""What the benchmarks share: timing in rounds, starting worker processes, naming the machine, writing cards.

No torch in here: the process that starts the workers stays out of their way.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[3]  # of the checkout, where there is one
_CARDS = ROOT / "tools" / "bench" / "results"
RESULTS = _CARDS if _CARDS.is_dir() else Path("results")
PACKAGES = ("cpinfer", "torch", "transformers", "deepspeed", "numpy")


class WorkersFailedError(RuntimeError):
    """The processes of a benchmark failed or took too long; they have said why."""


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work, measured n times; n is at least 1.

    >>> print(Timing((2.0, 1.0, 4.0)))
    2.00 s (1.00..4.00, n=3)
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a timing needs at least one measurement")

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        digits = 2 if self.median_s >= 1 else 4
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median_s:.{digits}f} s ({low:.{digits}f}..{high:.{digits}f}, n={len(self.seconds)})"

    def as_json(self) -> dict[str, Any]:
        return {"median_s": self.median_s, "min_s": min(self.seconds), "max_s": max(self.seconds), "n": self.num}

    @property
    def num(self) -> int:
        return len(self.seconds)


def timed(call: Callable[[], T], barrier: Callable[[], None]) -> tuple[T, float]:
    """What `call` gives and how long it took until every rank was done with it."""
    barrier()
    start_s = time.perf_counter()
    result = call()
    barrier()
    return result, time.perf_counter() - start_s


def rotated(names: Sequence[str], round_index: int) -> list[str]:
    """The contestants of a round: each goes first once before one goes first again.

    >>> rotated(["a", "b", "c"], 1)
    ['b', 'c', 'a']
    """
    at = round_index % len(names)
    return [*names[at:], *names[:at]]


def has_time_for_another(rounds_done: int, elapsed_s: float, budget_s: float, max_rounds: int) -> bool:
    """Whether one more round, as long as those before it, ends within the budget. The first round always runs."""
    if rounds_done == 0:
        return True
    return rounds_done < max_rounds and elapsed_s * (rounds_done + 1) / rounds_done <= budget_s


def run_workers(
    script: Path, num_ranks: int, task: Mapping[str, Any], *, num_threads: int = 1, timeout_s: float
) -> dict[str, Any]:
    """Start `script --worker TASK_FILE` on `num_ranks` processes; what rank 0 wrote to the task's `output`.

    All they print goes to stderr. WorkersFailedError when they fail or take longer than `timeout_s`; nothing is left
    behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        task_file, output = Path(folder) / "task.json", Path(folder) / "output.json"
        task_file.write_text(json.dumps({**task, "output": str(output)}), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
            *(str(script), "--worker", str(task_file)),
        ]
        # Cards say CPU, so a GPU that happens to be here stays out of it.
        env = {"OMP_NUM_THREADS": str(num_threads), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=sys.stderr.fileno(), start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise WorkersFailedError(
                    f"{script.name} on {num_ranks} ranks did not end within {timeout_s:g} s"
                ) from error
            raise
        if code != 0:
            raise WorkersFailedError(f"{script.name} on {num_ranks} ranks ended with exit code {code}; see above")
        result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return result


def read_task(path: str) -> dict[str, Any]:
    """What `run_workers` asked for."""
    task: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return task


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "|".join(c if c == "---" else f" {c} " for c in line) + "|" for line in lines)


@dataclass(frozen=True)
class Card:
    """One page of results: what was measured, how to measure it again, and the figures.

    `sections` are (heading, Markdown) in order. `resolved` is the configuration with all defaults filled in.
    """

    theme: str
    title: str
    command: str
    sections: tuple[tuple[str, str], ...]
    resolved: Mapping[str, Any]

    def text(self, machine: str, versions: Mapping[str, str | None]) -> str:
        """The page as Markdown."""
        told = "  ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        parts = [
            f"# {self.title}",
            f"Machine: {machine}  \nVersions: {told}  \nCommand: `{self.command}`",
            *(f"## {heading}\n\n{body}" for heading, body in self.sections),
            f"## Resolved configuration\n\n```json\n{json.dumps(self.resolved, indent=2)}\n```",
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> Path:
        """Write `<theme>_<hardware>.md`; returns where."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.theme}_{slug(machine_name())}.md"
        path.write_text(self.text(machine_name(), versions()), encoding="utf-8")
        return path


def bench_parser(description: str | None, *, budget_s: float) -> argparse.ArgumentParser:
    """The arguments that all benchmarks in rounds have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny model and prompts, a round or two, no card")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at most (default: 5)")
    told = f"seconds of rounds, all together (default: {budget_s:g})"
    parser.add_argument("--budget-s", type=float, default=budget_s, help=told)
    parser.add_argument("--results", metavar="DIR", help="where the card goes (default: tools/bench/results)")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)  # as `run_workers` starts it
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def run_bench(
    tool: str,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    bench: Callable[[argparse.Namespace, Sequence[str]], int],
    work: Callable[[dict[str, Any]], int],
) -> int:
    """A worker's part of a benchmark, or all of it. Its exit code: 1 when workers fail."""
    if args.worker:
        return work(read_task(args.worker))
    try:
        return bench(args, sys.argv[1:] if argv is None else argv)
    except WorkersFailedError as error:
        say(f"{tool}: {error}")
        return 1


def write_card(
    tool: str,
    title: str,
    sections: Sequence[tuple[str, str]],
    resolved: Mapping[str, Any],
    args: argparse.Namespace,
    argv: Sequence[str],
) -> Path | None:
    """The card of a run of `tool`, a file beside this one, and where it lies; quick runs leave one only where told."""
    if args.quick and not args.results:
        return None
    command = f"python tools/bench/{tool}.py" + "".join(f" {a}" for a in argv)
    theme = f"{tool}_quick" if args.quick else tool
    title += " (quick: a smoke run, not a result)" if args.quick else ""
    path = Card(theme, title, command, tuple(sections), resolved).write(Path(args.results or RESULTS))
    say(f"{tool}: wrote {path}")
    return path


def machine_name() -> str:
    """The processor, and how many of its cores are here."""
    model = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return f"{found.group(1).strip() if found else model}, {len(os.sched_getaffinity(0))} cores"


def slug(text: str) -> str:
    """A name that files can have.

    >>> slug("AMD EPYC, 2 cores")
    'amd_epyc_2_cores'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def versions() -> dict[str, str | None]:
    """What ran: packages, and the revision of this tree ("+" where files differ from it)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    revision = _git("rev-parse", "--short", "HEAD")
    found["revision"] = revision and revision + ("+" if _git("status", "--porcelain", "--", "cpinfer") else "")
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def free_port() -> int:
    """A port of this host that nobody listens at now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
