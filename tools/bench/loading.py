"""How long weights take to load, and how much host memory all ranks together have in use for it at the most.

    python tools/bench/loading.py               # minutes; writes a card to tools/bench/results/
    python tools/bench/loading.py --quick       # seconds; tiny, no card: only shows that it works

A checkpoint of random weights is written, loaded in each case in two ways, and deleted:

- plain: each rank calls `from_pretrained`, with Transformers' tensor parallelism where that is the case; AutoTP cuts
  the whole model after it
- ours: as the tools load (`launch_inference`)

Memory is the proportional set size (PSS) of all processes, sampled from outside: a page that several have mapped counts
once. From it is taken what they had before they loaded (Python, torch). It is sampled while they load, and after it
while they read every weight once, for a page that is mapped counts from its first use on. Files are in the page cache.
Garbage is collected before each load: a full collection over all that torch and Transformers have imported takes a
quarter of a second, and else falls into one way or the other by chance.

Every rank's weights are compared, bit by bit, between the ways, before any figure is printed. Exit 1 when they differ.
A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cpinfer_tools.measuring.harness import (
    ROOT,
    Timing,
    WorkersFailedError,
    bench_parser,
    has_time_for_another,
    rotated,
    run_bench,
    run_workers,
    say,
    table,
    write_card,
)

WAYS = ("plain", "ours")
SAMPLE_S = 0.05
# A busy machine samples rarely: what is looked at stays for so long.
STILL_S = 1.5
TARGET = 1.25


@dataclass(frozen=True)
class Case:
    """A layout, who shards for it, and the dtypes of files and of the model."""

    name: str
    tp: int
    pcp: int
    provider: str
    gb: float
    stored: str = "bfloat16"
    dtype: str = "bfloat16"

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pcp


def cases(gb: float) -> list[Case]:
    """Those of a run; where the dtype changes a quarter as large, for then whole models are copied."""
    return [
        Case("tp=4, AutoTP", 4, 1, "autotp", gb),
        Case("tp=4, Transformers", 4, 1, "transformers", gb),
        Case("pcp=2", 1, 2, "autotp", gb),
        Case("tp=4, AutoTP, float32 from bfloat16", 4, 1, "autotp", gb / 4, dtype="float32"),
        Case("tp=4, AutoTP, bfloat16 from float32", 4, 1, "autotp", gb / 4, stored="float32"),
    ]


class Sampler(threading.Thread):
    """The PSS of all descendants of this process, over time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            started_s = time.monotonic()
            self.samples.append((started_s, sum(map(pss_bytes, psutil.Process().children(recursive=True)))))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def between(self, start_s: float, stop_s: float) -> list[int]:
        """Samples of a time, and the last one before it."""
        return [num for at, num in self.samples if at < start_s][-1:] + [
            num for at, num in self.samples if start_s <= at <= stop_s
        ]


def pss_bytes(process: psutil.Process) -> int:
    """Bytes of memory of a process, of each shared page its part; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(case: Case, way: str, folder: Path) -> dict[str, Any]:
    """One launch of a case: seconds, bytes, and digests of every rank's weights."""
    sampler = Sampler()
    sampler.start()
    try:
        told = run_workers(
            Path(__file__), case.num_ranks, {**asdict(case), "way": way, "folder": str(folder)}, timeout_s=600
        )
    finally:
        sampler.stop()
    before_s, start_s, loaded_s, touched_s, used_s = told.pop("times_s")
    base = sampler.between(before_s, start_s)[-1]
    if not any(touched_s <= at <= used_s for at, _ in sampler.samples):
        raise WorkersFailedError(f"{case.name}, {way}: nothing was sampled while all weights were in use")
    peaks = {"loading_bytes": (start_s, loaded_s), "in_use_bytes": (loaded_s, used_s)}
    peak_bytes = {name: max(sampler.between(*span)) - base for name, span in peaks.items()}
    return {**told, "load_s": loaded_s - start_s, **peak_bytes}


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="cpinfer-loading-", dir=args.folder) as folder:
        for case in wanted(args):
            path = Path(folder) / f"{case.stored}-{case.gb:g}"
            if not path.exists():
                sizes[path.name] = written(path, case)
            runs = rounds(case, path, args)
            digests = [run["digests"] for of_way in runs.values() for run in of_way]
            if any(digest != digests[0] for digest in digests):
                say(f"loading: {case.name}: the ways give other weights")
                return 1
            found[case.name] = runs
            say(f"loading: {case.name}: done")
            sizes[case.name] = sizes[path.name]
    figures = {name: {way: summary(runs[way], sizes[name]) for way in WAYS} for name, runs in found.items()}
    write(figures, sizes, args, argv)
    print(json.dumps({"checkpoint_bytes": {name: sizes[name] for name in found}, "cases": figures}))
    return 0


def wanted(args: argparse.Namespace) -> list[Case]:
    """The cases of a run."""
    return [case for case in cases(0.05 if args.quick else args.gb) if args.only in (None, case.name)]


def rounds(case: Case, path: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Both ways in turn, as often as there is time for."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    start_s, most = time.perf_counter(), 1 if args.quick else args.rounds
    budget_s = args.budget_s / len(wanted(args))
    while has_time_for_another(len(runs["ours"]), time.perf_counter() - start_s, budget_s, most):
        for way in rotated(WAYS, len(runs["ours"])):
            runs[way].append(measure(case, way, path))
    return runs


def written(path: Path, case: Case) -> int:
    """Bytes of a new checkpoint."""
    maker = [sys.executable, str(ROOT / "tools" / "dev" / "make_checkpoint.py"), str(path)]
    command = [*maker, "--gb", str(case.gb), "--dtype", case.stored]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    num_bytes: int = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return num_bytes


def summary(runs: Sequence[Mapping[str, Any]], checkpoint_bytes: int) -> dict[str, Any]:
    """Of all launches the median time, and the most memory."""
    loading, using = (max(run[key] for run in runs) for key in ("loading_bytes", "in_use_bytes"))
    return {
        "load_s": Timing(tuple(run["load_s"] for run in runs)).as_json(),
        "cpu_s": Timing(tuple(run["cpu_s"] for run in runs)).as_json(),
        "loading_bytes": loading,
        "in_use_bytes": using,
        "times_checkpoint": max(loading, using) / checkpoint_bytes,
    }


def write(figures: Mapping[str, Any], sizes: Mapping[str, int], args: argparse.Namespace, argv: Sequence[str]) -> None:
    """The table for people, and the card."""
    header = ["case", "checkpoint", "way", "load", "processors", "peak while loading", "in use", "peak / checkpoint"]
    rows = []
    for name, of_ways in figures.items():
        for way in WAYS:
            of = of_ways[way]
            seconds = [
                f"{of[key]['median_s']:.2f} s ({of[key]['min_s']:.2f}..{of[key]['max_s']:.2f})"
                for key in ("load_s", "cpu_s")
            ]
            memory = [f"{of[key] / 1e9:.2f} GB" for key in ("loading_bytes", "in_use_bytes")]
            row = [name, f"{sizes[name] / 1e9:.2f} GB", way, *seconds, *memory, f"{of['times_checkpoint']:.2f}"]
            rows.append(row)
    shown = table(header, rows)
    say(shown)
    text = (
        "Memory of all ranks together, above what they had before they loaded; seconds until the last rank had loaded, "
        "and of processors, all ranks together, median (least..most). Every rank's parameters have the same bits both "
        "ways."
    )
    resolved = {"gb": args.gb, "rounds": args.rounds, "cases": [asdict(case) for case in wanted(args)]}
    write_card(
        "loading", "Loading weights: time and host memory", [("Results", f"{shown}\n\n{text}")], resolved, args, argv
    )


# What each rank runs.


def work(task: dict[str, Any]) -> int:
    import gc
    import os

    import torch
    import torch.distributed as dist

    from cpinfer.comm.bootstrap import Launch, default_group

    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        load = prepared(task)
        gc.collect()
        dist.barrier()
        times_s = [time.monotonic()]
        time.sleep(STILL_S)
        dist.barrier()
        times_s.append(time.monotonic())
        cpu_s = time.process_time()
        model = load()
        cpu_s = time.process_time() - cpu_s
        dist.barrier()
        times_s.append(time.monotonic())
        for weight in local_weights(model).values():
            weight.view(-1).view(torch.uint8).max()
        dist.barrier()
        touched_s = time.monotonic()
        time.sleep(STILL_S)
        dist.barrier()
        times_s += [touched_s, time.monotonic()]
        digests: list[Any] = [None] * launch.world_size
        dist.all_gather_object(digests, {name: digest(weight) for name, weight in local_weights(model).items()})
        total = torch.tensor(cpu_s)
        dist.all_reduce(total)
        if launch.rank == 0:
            told = {"times_s": times_s, "digests": digests, "cpu_s": total.item()}
            Path(task["output"]).write_text(json.dumps(told), encoding="utf-8")
    return 0


def prepared(task: Mapping[str, Any]) -> Any:
    """A function that loads the model; what it needs is imported, and its groups can be made."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from cpinfer.layout.grid import RankGrid
    from cpinfer_integrations import deepspeed, launching
    from cpinfer_tools.run_config import parse_run_config

    dtype, grid = getattr(torch, task["dtype"]), RankGrid(task["tp"], task["pcp"], task["pcp"])
    sharded = task["tp"] > 1
    config = parse_run_config(
        {
            "model": task["folder"],
            "dtype": task["dtype"],
            "tensor_parallel": {"tp_size": task["tp"], "provider": task["provider"]},
            "prefill_context_parallel_size": task["pcp"],
        }
    )
    if task["way"] == "ours":
        return lambda: launching.launch_inference(config, grid, torch.device("cpu"))[0]
    options: dict[str, Any] = {}
    if sharded and task["provider"] == "transformers":
        options["distributed_config"] = DistributedConfig(tp_size=task["tp"])

    def load() -> Any:
        whole = AutoModelForCausalLM.from_pretrained(task["folder"], trust_remote_code=False, dtype=dtype, **options)
        return autotp(deepspeed, whole, grid, dtype) if sharded and not options else whole

    return load


def autotp(deepspeed: Any, whole: Any, grid: Any, dtype: Any) -> Any:
    """AutoTP's model, of a whole one."""
    import torch.distributed as dist

    deepspeed.init_distributed()
    return deepspeed.cut_by_autotp(whole, grid, dist.group.WORLD, dtype).module


def local_weights(model: Any) -> dict[str, Any]:
    """A rank's part of every parameter."""
    from cpinfer.models.local_weights import local

    return {name: local(weight.detach()) for name, weight in model.named_parameters()}


def digest(weight: Any) -> str:
    import hashlib

    import torch

    return hashlib.blake2b(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = bench_parser(__doc__, budget_s=900)
    parser.add_argument("--gb", type=float, default=2.0, help="10^9 bytes of the checkpoint, about (default: 2)")
    parser.add_argument("--only", choices=[case.name for case in cases(1.0)], help="one case of them")
    parser.add_argument("--folder", metavar="DIR", help="where checkpoints are written for a while (default: TMPDIR)")
    args = parser.parse_args(argv)
    return run_bench("loading", args, argv, bench, work)


if __name__ == "__main__":
    sys.exit(main())
