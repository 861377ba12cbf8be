"""Agents: many turns with tools in between, in sessions beside TRL's lock-step loop; and what the open interface costs.

    python tools/bench/agents.py                # half an hour; writes a card to tools/bench/results/
    python tools/bench/agents.py --quick        # seconds; tiny, no card: only shows that it works

16 samples of one prompt take 8 turns: 32 tokens are generated in each, then a tool answers with 256 given tokens. Tools
take 0 to 2 s (seeded) in one job, no time in the other. One process of one thread, float32, greedy, the same random
model for all:

    sessions      `open_session` for each sample, `run_until`, tools in a pool of threads: who has its answer goes on
    lock-step     all samples generate, from their whole sequences; then the tools of all, one after the other; again

Lock-step is what TRL does (`GRPOTrainer._tool_call_loop` in 1.16): a synchronous tool is called where the loop over
samples stands, and coroutines of asynchronous ones are waited for sample by sample, so with one call per sample and
turn one tool runs at a time either way. Its generation is `generate`, left-padded, or `generate_batch`, each turn by a
manager of its own, as TRL calls it. "generate, tools at once" is lock-step with the tools of a turn side by side, which
TRL has not: it shows what sessions gain beyond that.

Before any time is printed, every generated token must be the whole model's likeliest (one forward over the sequence),
or within a near-tie of it. Exit 1 when one is not. Ratios are the peer's median over ours: above 1, ours is ahead.

Then two costs of the open interface, of processor time: the same requests by `add` and `step` beside `generate`, and a
step while ever more requests wait. A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent_jobs import (
    BLOCK_SIZE,
    FULL,
    LOCK_STEP,
    OURS,
    QUICK,
    STEP_TOKENS,
    LockStep,
    Sessions,
    Size,
    floor_s,
    jobs_of,
    unlikely,
)
from cpinfer_tools.measuring.harness import (
    Timing,
    bench_parser,
    has_time_for_another,
    rotated,
    run_bench,
    run_workers,
    say,
    table,
    write_card,
)
from cpinfer_tools.measuring.workloads import (
    QUICK_SHAPE,
    Speed,
    engine_workloads,
    make_model,
    measure_speed,
    shape_as_dict,
)

# Requests that decode while others wait.
NUM_RUNNING = 32
# Of the budget, for each part.
SHARES = {"slow": 0.5, "instant": 0.25, "group": 0.1, "ragged": 0.15}
# What was to be reached.
MAX_PREFILLED, MAX_OVERHEAD, MIN_AHEAD = 1.05, 0.02, {"slow": 2.0, "instant": 1.0}


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("agents", parse_args(argv), argv, bench, work)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return bench_parser(__doc__, budget_s=2000).parse_args(argv)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the worker, then tell: table, card, summary."""
    size = QUICK if args.quick else FULL
    task = {"quick": args.quick, "rounds": 1 if args.quick else args.rounds, "budget_s": args.budget_s}
    outcome = run_workers(Path(__file__).resolve(), 1, task, timeout_s=300 + 2 * args.budget_s)
    card = None
    if outcome["complaints"]:
        say("agents: no times, tokens are wrong:\n" + "\n".join(outcome["complaints"]))
    else:
        sections = describe(outcome, size)
        say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
        resolved = {**asdict(size), "shape": shape_as_dict(size.shape), "seeds": [31, 32, 33], "block_size": BLOCK_SIZE}
        resolved |= {"max_num_batched_tokens": STEP_TOKENS, "num_running": NUM_RUNNING, "rounds": task["rounds"]}
        resolved |= {"budget_s": args.budget_s, "threads_per_process": 1, "dtype": "float32"}
        title = "Agents: turns with tools in sessions, beside TRL's lock-step loop"
        card = write_card("agents", title, sections, resolved, args, argv)
    print(json.dumps(summarize(outcome, size, card)), flush=True)
    return 1 if outcome["complaints"] else 0


def work(task: Mapping[str, Any]) -> int:
    """The measuring process: check and time all jobs, then the two costs."""
    import torch
    import transformers

    from cpinfer_tools.measuring.contestants import Contestant, Generate, GenerateBatch

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    size = QUICK if task["quick"] else FULL
    model = make_model(size.shape)
    peers: list[Contestant] = [Generate(model), GenerateBatch(model)]
    sessions = Sessions(model, size.shape)
    loops = [sessions, *(LockStep(model, peer) for peer in peers)]
    contestants = {"slow": [*loops, LockStep(model, peers[0], at_once=True)], "instant": loops}
    outcome = run_jobs(task, size, contestants, sessions, model)
    if not outcome["complaints"]:
        outcome |= run_costs(task, size, model)
    Path(task["output"]).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def run_jobs(
    task: Mapping[str, Any], size: Size, contestants: Mapping[str, Sequence[Any]], sessions: Sessions, model: Any
) -> dict[str, Any]:
    """All contestants take turns in rounds; the answers of every run are checked between them."""
    complaints: list[str] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    prefilled: dict[str, int] = {}
    for tiny in jobs_of(QUICK) if not task["quick"] else ():  # warm up
        for contestant in contestants[tiny.name]:
            contestant.run(tiny)
    speeds = [measure_speed(size.shape)]
    for job in jobs_of(size):
        by_name = {contestant.name: contestant for contestant in contestants[job.name]}
        seconds[job.name] = {name: [] for name in by_name}
        start_s, rounds = time.perf_counter(), 0
        share_s = task["budget_s"] * SHARES[job.name]
        while has_time_for_another(rounds, time.perf_counter() - start_s, share_s, task["rounds"]):
            for name in rotated(list(by_name), rounds):
                run_s = time.perf_counter()
                answers = by_name[name].run(job)
                seconds[job.name][name].append(time.perf_counter() - run_s)
                complaints += unlikely(model, job, name, answers)
                say(f"agents: {job.name}, round {rounds + 1}, {name}: {seconds[job.name][name][-1]:.2f} s")
            rounds += 1
        speeds.append(measure_speed(size.shape))
        prefilled[job.name] = sessions.num_prefilled_tokens
    speed = Speed(max(s.gflop_per_s for s in speeds), max(s.gbyte_per_s for s in speeds))
    floors = {job.name: floor_s(job, size.shape, speed) for job in jobs_of(size)}
    return {
        "seconds": seconds,
        "prefilled": prefilled,
        "floor_s": floors,
        "speed": asdict(speed),
        "complaints": complaints,
    }


def run_costs(task: Mapping[str, Any], size: Size, model: Any) -> dict[str, Any]:
    """The open loop beside the closed one, in turns; and steps while others wait."""
    from open_steps import NUM_WAITING, Loops, waiting_step_us

    complaints: list[str] = []
    spent: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for workload in engine_workloads(size.shape, quick=task["quick"])[:2]:
        loops = Loops(model, size.shape, workload)
        ways = {"generate": loops.closed, "add and step": loops.opened}
        spent[workload.name] = {name: [] for name in ways}
        expected = loops.closed().tokens
        start_s, rounds, share_s = time.perf_counter(), 0, task["budget_s"] * SHARES[workload.name]
        while has_time_for_another(rounds, time.perf_counter() - start_s, share_s, 3 * task["rounds"]):
            for name in rotated(list(ways), rounds):
                loop = ways[name]()
                spent[workload.name][name].append((loop.taken_s, loop.outside_s))
                if loop.tokens != expected:
                    complaints.append(f"{workload.name}: {name} gave other tokens than the first generate")
            rounds += 1
        say(f"agents: {workload.name}, open and closed: {rounds} rounds")
    counts = NUM_WAITING if not task["quick"] else NUM_WAITING[:2]
    waiting: dict[str, list[float]] = {str(n): [] for n in counts}
    for repeat in range(task["rounds"]):
        for n in rotated(list(waiting), repeat):
            waiting[n] += waiting_step_us(QUICK_SHAPE, int(n), NUM_RUNNING, size.num_steps)
    return {"spent": spent, "waiting_us": waiting, "complaints": complaints}


def describe(outcome: Mapping[str, Any], size: Size) -> tuple[tuple[str, str], ...]:
    """The card's sections."""
    from open_steps import share_beyond, share_outside

    rows = []
    for job in jobs_of(size):
        ours = Timing(tuple(outcome["seconds"][job.name][OURS]))
        for name, values in outcome["seconds"][job.name].items():
            timing = Timing(tuple(values))
            tokens = outcome["prefilled"][job.name] if name == OURS else job.num_lock_step_tokens
            computed = f"{tokens:,} ({tokens / job.num_distinct_tokens:.2f} x)"
            share = f"{outcome['floor_s'][job.name] / timing.median_s:.0%}"
            ratio = "" if name == OURS else f"{timing.median_s / ours.median_s:.2f}"
            rows.append([job.name, name, str(timing), share, ratio, computed])
    slow, _ = jobs_of(size)
    calls = [s for turns in slow.tools_s for s in turns]
    body = table(["tools", "loop", "median (min..max)", "of the bound", "x ours", "prompt tokens computed"], rows)
    body += (
        f"\n\n{slow.num_samples} samples x {slow.num_turns} turns, {size.given_tokens} given and {size.new_tokens} "
        f"generated tokens each; {slow.num_distinct_tokens:,} distinct given tokens. Slow tools take "
        f"{min(calls):.2f} to {max(calls):.2f} s, {sum(calls):.0f} s together, those of one sample at most "
        f"{max(map(sum, slow.tools_s)):.1f} s. Computed prompt tokens of sessions are the engine's `stats`; those of "
        f"lock-step are the lengths of its prompts (`generate_batch` may find some cached).\n\nBound: slow "
        f"{outcome['floor_s']['slow']:.2f} s, instant {outcome['floor_s']['instant']:.2f} s: each token computed once "
        f"and all samples decoded at once at {outcome['speed']['gflop_per_s']:.0f} GFLOP/s and "
        f"{outcome['speed']['gbyte_per_s']:.1f} GB/s, or the tools of the sample whose tools take longest.\n\n"
    )
    body += "\n".join(f"- {line}" for line in verdicts(outcome, size))
    overheads = []
    for name, ways in outcome["spent"].items():
        timings = [str(Timing(tuple(taken_s for taken_s, _ in loops))) for loops in ways.values()]
        beyond = f"{share_beyond(ways['add and step'], ways['generate']):+.2%}"
        overheads.append([name, *timings, beyond, *(f"{share_outside(loops):.2%}" for loops in ways.values())])
    steps = [
        [f"{int(n):,}", f"{statistics.median(us):,.0f}", f"{min(us):,.0f}..{max(us):,.0f}"]
        for n, us in outcome["waiting_us"].items()
    ]
    return (
        ("Turns with tools: 1 process, 1 thread", body),
        (
            "The open interface beside the closed batch: processor seconds, in turns",
            table(
                ["workload", "generate", "add and step", "more", "outside of steps, generate", "add and step"],
                overheads,
            )
            + f"\n\nAt most {MAX_OVERHEAD:.0%} more was wanted. What the interface itself takes is outside of steps; "
            "runs differ by more than that in how fast the same steps are.",
        ),
        (
            f"A decode step of {NUM_RUNNING} running requests while others wait: processor time",
            table(["waiting", "us per step, median", "min..max"], steps)
            + "\n\nThe model is tiny, so that it hides nothing.",
        ),
    )


def verdicts(outcome: Mapping[str, Any], size: Size) -> list[str]:
    """One sentence for each thing that was to be reached, and whether it was."""
    found = figures(outcome, size)
    told = []
    for job, wanted in MIN_AHEAD.items():
        ratio = found[f"{job}_lock_step_over_sessions"]
        told.append(
            f"{job} tools: {ratio:.2f} times as fast as the faster lock-step loop; above {wanted:g} was wanted."
        )
    ratio = found["prefilled_over_distinct"]
    told.append(f"prompt tokens computed: {ratio:.3f} of the distinct ones; at most {MAX_PREFILLED:g} was wanted.")
    return told


def figures(outcome: Mapping[str, Any], size: Size) -> dict[str, float]:
    """What is held against what was wanted."""
    found = {}
    for job, ways in outcome["seconds"].items():
        medians = {name: statistics.median(values) for name, values in ways.items()}
        best = min(s for name, s in medians.items() if name.endswith(LOCK_STEP))
        found[f"{job}_lock_step_over_sessions"] = best / medians[OURS]
    worst = max(outcome["prefilled"][job.name] / job.num_distinct_tokens for job in jobs_of(size))
    return {**found, "prefilled_over_distinct": worst}


def summarize(outcome: Mapping[str, Any], size: Size, card: Path | None) -> dict[str, Any]:
    """The last line of stdout; no times where tokens are wrong."""
    summary: dict[str, Any] = {"benchmark": "agents", "tokens_agree": not outcome["complaints"]}
    if outcome["complaints"]:
        return {**summary, "card": None}
    from open_steps import share_beyond, share_outside

    return {
        **summary,
        **figures(outcome, size),
        "floor_s": outcome["floor_s"],
        "median_s": {
            job: {n: statistics.median(s) for n, s in ways.items()} for job, ways in outcome["seconds"].items()
        },
        "open_beyond_closed": {
            name: share_beyond(ways["add and step"], ways["generate"]) for name, ways in outcome["spent"].items()
        },
        "outside_of_steps": {
            workload: {name: share_outside(loops) for name, loops in ways.items()}
            for workload, ways in outcome["spent"].items()
        },
        "step_us_while_waiting": {n: statistics.median(us) for n, us in outcome["waiting_us"].items()},
        "card": None if card is None else str(card),
    }


if __name__ == "__main__":
    sys.exit(main())
