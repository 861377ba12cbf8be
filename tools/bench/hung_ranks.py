"""How long a rank that was stopped keeps the others: from SIGSTOP to the end of all of them, and what they say.

    python tools/bench/hung_ranks.py             # 24 rounds of a quarter of a minute; a card to tools/bench/results/
    python tools/bench/hung_ranks.py --quick     # three rounds with a short timeout, no card

Four processes (tp=1, pcp=4) generate with collective_timeout_s of 10. In each round one of them is stopped between or
within steps, another one every time; the first holds the store through which ranks tell of themselves, as it does under
DeepSpeed's launcher. Ranks exchange in shared memory, over gloo, or over groups of gloo that never raise, as NCCL's do
not, so that the watch has to end the process. The bound is the timeout itself. A round in which an end does not name
the stopped rank, or all the others have not ended within a minute, fails the benchmark. A table goes to stderr, the
last stdout line is one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from cpinfer_tools.measuring.harness import ROOT, bench_parser, say, table, write_card

MODEL = ROOT / "configs" / "recall-tiny"
NUM_RANKS = 4
TIMEOUT_S, QUICK_TIMEOUT_S = 10.0, 2.0
WITHIN_S = 60.0
MOST_STEPS_S = 0.5
SHARED, GLOO, WATCHED = "shared", "gloo", "watched"
WAYS = {
    SHARED: "exchanges in shared memory raise",
    GLOO: "collectives of gloo raise",
    WATCHED: "nothing raises: the watch ends them",
}


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = bench_parser(__doc__, budget_s=900)
    parser.set_defaults(rounds=24)
    args = parser.parse_args(given)
    task: dict[str, Any] = {
        "ranks": NUM_RANKS,
        "collective_timeout_s": QUICK_TIMEOUT_S if args.quick else TIMEOUT_S,
        "rounds": len(WAYS) if args.quick else args.rounds,
    }
    model = load()  # before ranks are forked: they have it, and all imports, at once
    rounds = [
        one_round(model, i // len(WAYS) % NUM_RANKS, list(WAYS)[i % len(WAYS)], task["collective_timeout_s"], seed=i)
        for i in range(task["rounds"])
    ]
    sections = describe(rounds, task["collective_timeout_s"])
    for _, body in sections:
        say(body)
    card = write_card("hung_ranks", "How long a stopped rank keeps the others", sections, task, args, given)
    print(json.dumps({"benchmark": "hung_ranks", **summary(rounds), "card": None if card is None else str(card)}))
    return 0


def load() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import cpinfer.engine.attach  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)


def one_round(model: Any, stopped: int, way: str, timeout_s: float, seed: int) -> dict[str, Any]:
    """Seconds from the stop of a rank to the end of all others. AssertionError when one says something else."""
    port = 29_600 + os.getpid() % 300 + seed
    with tempfile.TemporaryDirectory() as folder:
        pids = [fork(model, rank, way, timeout_s, port, Path(folder)) for rank in range(NUM_RANKS)]
        try:
            wait_until(lambda: all((Path(folder) / f"ready{rank}").exists() for rank in range(NUM_RANKS)), "begin")
            time.sleep(MOST_STEPS_S * (seed * 0.37 % 1))  # steps take milliseconds: anywhere in one
            os.kill(pids[stopped], signal.SIGSTOP)
            start_s = time.perf_counter()
            ends_s: dict[int, float] = {}

            def note_ends() -> bool:
                for rank, pid in enumerate(pids):
                    if rank not in ends_s and rank != stopped and os.waitpid(pid, os.WNOHANG)[0]:
                        ends_s[rank] = time.perf_counter() - start_s
                return len(ends_s) == NUM_RANKS - 1

            wait_until(note_ends, "end")
            for rank in ends_s:
                said = (Path(folder) / f"stderr{rank}").read_text(errors="replace")
                assert f"rank {stopped} (pid {pids[stopped]})" in said, f"rank {rank} said {said!r}"
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
    found = {"stopped": stopped, "way": way, "first_s": min(ends_s.values()), "last_s": max(ends_s.values())}
    say(f"hung_ranks: {found}")
    return found


def wait_until(condition: Any, what: str) -> None:
    until_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < until_s, f"ranks did not {what} within {WITHIN_S:g} s"
        time.sleep(0.01)


def fork(model: Any, rank: int, way: str, timeout_s: float, port: int, folder: Path) -> int:
    """A process that is one rank; its id."""
    pid = os.fork()
    if pid == 0:
        become(model, rank, way, timeout_s, port, folder)
    return pid


def become(model: Any, rank: int, way: str, timeout_s: float, port: int, folder: Path) -> NoReturn:
    """This process, as a launcher would have started it."""
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    generate(model, way, timeout_s, folder)


def generate(model: Any, way: str, timeout_s: float, folder: Path) -> NoReturn:
    """Generate until another rank does not come, and end as a tool does."""
    from functools import partial

    import torch
    from torch.distributed import ProcessGroupGloo

    import cpinfer
    from cpinfer.comm.bootstrap import Launch, default_group, die, end_process
    from cpinfer.config import JobConfig, SamplingParams
    from cpinfer.layout.grid import RankGrid

    if way == WATCHED:
        ProcessGroupGloo._set_default_timeout = lambda *given: None  # type: ignore[method-assign]
    launch = Launch.from_environ(os.environ)
    torch.set_num_threads(1)
    config = JobConfig(
        dtype="float32",
        kv_cache_gib=0.1,
        collective_timeout_s=timeout_s,
        collectives="auto" if way == SHARED else "group",
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
    try:
        with default_group(launch, timeout_s):
            topology = cpinfer.Topology.from_world(RankGrid(pcp_size=NUM_RANKS, dcp_size=NUM_RANKS))
            topology = topology.ending(partial(end_process, launch.rank))
            with cpinfer.attach(model, topology, config) as engine:
                while True:
                    engine.generate([tuple(range(1, 60))] * 4, sampling)
                    (folder / f"ready{launch.rank}").touch()
    except BaseException as error:
        die(launch, error, program="hung_ranks")


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and maximum of the seconds until the last rank had ended."""
    found: dict[str, Any] = {"rounds": len(rounds)}
    for way in WAYS:
        last_s = [each["last_s"] for each in rounds if each["way"] == way]
        if last_s:
            found[f"{way}_median_s"] = round(statistics.median(last_s), 2)
            found[f"{way}_max_s"] = round(max(last_s), 2)
    return found


def describe(rounds: Sequence[dict[str, Any]], timeout_s: float) -> tuple[tuple[str, str], ...]:
    """The card's sections."""
    rows = []
    for way, name in WAYS.items():
        for stopped in range(NUM_RANKS):
            which = "rank 0, which holds the store" if stopped == 0 else f"rank {stopped}"
            last_s = [each["last_s"] for each in rounds if each["way"] == way and each["stopped"] == stopped]
            if last_s:
                median, most = statistics.median(last_s), max(last_s)
                rows.append([name, which, str(len(last_s)), f"{median:.1f}", f"{most:.1f}", f"{most - timeout_s:.1f}"])
    header = ["how", "stopped", "rounds", "median, s", "max, s", "beyond the timeout, s"]
    heading = f"From SIGSTOP to the end of the last other rank, collective_timeout_s {timeout_s:g}"
    total = summary(rounds)
    parts = [
        f"{way}: median {total[f'{way}_median_s']} s, max {total[f'{way}_max_s']} s"
        for way in WAYS
        if f"{way}_median_s" in total
    ]
    return ((heading, f"{table(header, rows)}\n\n{'; '.join(parts)}. Every end named the stopped rank."),)


if __name__ == "__main__":
    sys.exit(main())
