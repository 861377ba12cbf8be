"""Samples of one prompt attending to it together in decode, beside each by itself: `cascade_attention` on and off.

    python tools/bench/cascade.py               # minutes; writes a card to tools/bench/results/
    python tools/bench/cascade.py --quick       # seconds; tiny, no card: only shows that it works

Groups of eight samples over prompts of several lengths, in one process of one thread, float32, greedy, a random model.
The two ways take turns within a round. Timed are a decode step (of all samples; the time per token of those prefilled
last, which wait for no other prompt) and the whole rollout, whose prefill is the same. Before any time is printed the
tokens of all runs are compared: they must be the same, or part at a near-tie of the whole model's logits. Exit 1 when
they do not.

The bound of a step: weights once, and the KV of every sample once; or that of the prompt once for each group.
A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpinfer_tools.measuring.harness import (
    Timing,
    bench_parser,
    has_time_for_another,
    rotated,
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
    decode_floor_s,
    make_model,
    measure_speed,
    partings,
    random_prompts,
    shape_as_dict,
)

if TYPE_CHECKING:
    from cpinfer.engine.request import RolloutResult

WAYS = ("on", "off")
NUM_SAMPLES = 8


@dataclass(frozen=True)
class Size:
    """The model, and (groups, prompt tokens) of each batch."""

    shape: ModelShape
    batches: tuple[tuple[int, int], ...]
    new_tokens: int


FULL = Size(ModelShape(num_layers=2), ((8, 128), (8, 256), (8, 512), (4, 2048), (2, 8192)), new_tokens=64)
QUICK = Size(QUICK_SHAPE, ((2, 32), (1, 64)), new_tokens=4)


@dataclass(frozen=True)
class Run:
    """One rollout of a batch: the tokens of every sample, seconds of a decode step and of all."""

    tokens: list[list[int]]
    step_s: float
    wall_s: float


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    size = QUICK if args.quick else FULL
    workloads = workloads_of(size)
    runs, complaints, speed = compare(size, workloads, args.rounds if not args.quick else 1, args.budget_s)
    card = None
    if complaints:
        say("cascade: no times, the ways disagree:\n" + "\n".join(complaints))
    else:
        from cpinfer_tools.measuring.contestants import BLOCK_SIZE

        body = describe(runs, workloads, size, speed)
        say(body)
        resolved = {"model": shape_as_dict(size.shape), "batches": size.batches, "new_tokens": size.new_tokens}
        resolved |= {"num_samples": NUM_SAMPLES, "block_size": BLOCK_SIZE, "seed_of_prompts": 31, "rounds": args.rounds}
        resolved |= {"budget_s": args.budget_s, "threads": 1, "dtype": "float32"}
        sections, title = [("Decode steps of groups", body)], "Samples of one prompt attending to it together"
        card = write_card("cascade", title, sections, resolved, args, sys.argv[1:] if argv is None else argv)
    print(json.dumps(summarize(runs, complaints, card)), flush=True)
    return 1 if complaints else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return bench_parser(__doc__, budget_s=300).parse_args(argv)


def workloads_of(size: Size) -> list[Workload]:
    """A batch of groups for each length of prompt."""
    return [
        Workload(
            f"{groups} x {NUM_SAMPLES} samples of {length:,} tokens",
            random_prompts([length] * groups, size.shape.vocab_size, 31),
            (size.new_tokens,) * groups,
            NUM_SAMPLES,
        )
        for groups, length in size.batches
    ]


def compare(
    size: Size, workloads: Sequence[Workload], num_rounds: int, budget_s: float
) -> tuple[dict[str, dict[str, list[Run]]], list[str], Speed]:
    """All runs by batch and way, what is wrong with their tokens, and what the machine reached meanwhile."""
    import time

    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = make_model(size.shape)
    runs: dict[str, dict[str, list[Run]]] = {w.name: {way: [] for way in WAYS} for w in workloads}
    for way in WAYS:
        rollout(model, size.shape, workloads[0], way)
    speeds, start_s, rounds = [measure_speed(size.shape)], time.perf_counter(), 0
    while has_time_for_another(rounds, time.perf_counter() - start_s, budget_s, num_rounds):
        for workload in workloads:
            for way in rotated(WAYS, rounds):
                run = rollout(model, size.shape, workload, way)
                runs[workload.name][way].append(run)
                say(f"cascade: round {rounds + 1}, {workload.name}, {way}: {run.step_s * 1e3:.1f} ms a step")
        speeds.append(measure_speed(size.shape))
        rounds += 1
    complaints = [text for w in workloads for text in disagreements(model, w, runs[w.name])]
    speed = Speed(max(s.gflop_per_s for s in speeds), max(s.gbyte_per_s for s in speeds))
    return runs, complaints, speed


def rollout(model: Any, shape: ModelShape, workload: Workload, way: str) -> Run:
    """One rollout, with the engine made for it."""
    import cpinfer
    from cpinfer.config import SamplingParams, config_to_dict, parse_config
    from cpinfer_tools.measuring.contestants import Cpinfer

    contestant = Cpinfer(model, cpinfer.Topology.single(), shape)
    changes = {"cascade_attention": way, "enable_prefix_caching": False}
    config = parse_config({**config_to_dict(contestant.config(workload)), **changes})
    prompts = [list(prompt) for prompt in workload.prompts]
    sampling = SamplingParams(
        temperature=0, max_new_tokens=workload.max_new_tokens[0], n=workload.num_samples, ignore_eos=True
    )
    with cpinfer.attach(model, contestant.topology, config) as engine:
        results, wall_s = timed(lambda: engine.generate(prompts, sampling), lambda: None)
    return Run([list(r.token_ids) for r in results], min(map(_tpot_s, results)), wall_s)


def _tpot_s(result: RolloutResult) -> float:
    assert result.tpot_s is not None, "answers have more than one token here"
    return result.tpot_s


def disagreements(model: Any, workload: Workload, runs: dict[str, list[Run]]) -> list[str]:
    """A sentence for each sample whose tokens differ between runs, other than at a near-tie."""
    oracle, *others = [run for way in WAYS for run in runs[way]]
    found = []
    for run in others:
        for i, margin in partings(model, workload, run.tokens, oracle.tokens):
            if margin > NEAR_TIE:
                found.append(
                    f"{workload.name}: sample {i} parts where one token's logit is {margin:.3g} above another's"
                )
    return found


def describe(runs: dict[str, dict[str, list[Run]]], workloads: Sequence[Workload], size: Size, speed: Speed) -> str:
    """The card's table, and how to read it."""
    rows = []
    for workload in workloads:
        on, off = (runs[workload.name][way] for way in WAYS)
        for way, given, other in (("together", on, off), ("each by itself", off, on)):
            step = Timing(tuple(run.step_s * 1e3 for run in given))
            num_reads = 1 if given is on else workload.num_samples
            middle = size.new_tokens // 2
            bound = decode_floor_s(workload, size.shape, speed, middle, prompt_reads=num_reads) * 1e3
            ratios = ["", ""]
            if given is off:
                ratios = [f"{a / b:.2f}" for a, b in zip(_medians(given), _medians(other), strict=True)]
            spread = f"{step.median_s:.1f} ({min(step.seconds):.1f}..{max(step.seconds):.1f}, n={step.num})"
            rows.append([workload.name, way, spread, f"{bound:.1f}", f"{bound / step.median_s:.0%}", *ratios])
    header = ["batch", "attention to the prompt", "decode step, ms", "bound", "of it", "x step", "x rollout"]
    return (
        table(header, rows)
        + f"\n\nRatios above 1: together is faster. `auto` takes it where it saves {_min_saved_keys()} keys per query. "
        f"Bound: weights once, and KV of every sample once, or of the prompt once per group, at the "
        f"{speed.gflop_per_s:.0f} GFLOP/s and {speed.gbyte_per_s:.1f} GB/s that one core reaches here."
    )


def _min_saved_keys() -> int:
    from cpinfer.attention.backends.cpu_backend import MIN_SAVED_KEYS

    return MIN_SAVED_KEYS


def _medians(runs: Sequence[Run]) -> tuple[float, float]:
    return Timing(tuple(r.step_s for r in runs)).median_s, Timing(tuple(r.wall_s for r in runs)).median_s


def summarize(runs: dict[str, dict[str, list[Run]]], complaints: Sequence[str], card: Path | None) -> dict[str, Any]:
    """The last line of stdout; times are null when the ways disagree."""
    batches = {}
    for name, by_way in runs.items():
        medians = {way: _medians(by_way[way]) if not complaints else (None, None) for way in WAYS}
        batches[name] = {f"{way}_{key}": medians[way][i] for way in WAYS for i, key in enumerate(("step_s", "wall_s"))}
    return {
        "benchmark": "cascade",
        "tokens_agree": not complaints,
        "batches": batches,
        "card": None if card is None else str(card),
    }


if __name__ == "__main__":
    sys.exit(main())
