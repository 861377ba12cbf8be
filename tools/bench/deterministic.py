"""What the deterministic mode costs: rollouts with and without it, and training steps with and without its forward.

    python tools/bench/deterministic.py             # minutes; writes a card to tools/bench/results/
    python tools/bench/deterministic.py --quick     # seconds; tiny, no card: only shows that it works

The workloads of engine.py (a GRPO group, a ragged batch, one long prompt) and a padded training step, in float32 and
bfloat16, in one process of one thread. Both modes take turns within a round; rounds repeat until --budget-s is spent.
Before any time is printed, the deterministic answers of all rounds must be the same in every bit of their logprobs, the
default mode may part from them at near-ties alone, and the logits of the training forward must be those of each
sequence by itself. Exit 1 when they are not. Seconds are those of the processor: one thread computes, and what others
take of the machine is not in them. Ratios are medians of deterministic over default: below 1, the mode is faster.

A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import copy
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import cpinfer
from cpinfer_tools.measuring.contestants import Cpinfer
from cpinfer_tools.measuring.harness import (
    Timing,
    bench_parser,
    has_time_for_another,
    rotated,
    say,
    table,
    write_card,
)
from cpinfer_tools.measuring.workloads import (
    NEAR_TIE,
    QUICK_SHAPE,
    ModelShape,
    Workload,
    engine_workloads,
    make_model,
    partings,
    random_prompts,
    shape_as_dict,
)

DEFAULT, DETERMINISTIC = MODES = ("default", "deterministic")
DTYPES = ("float32", "bfloat16")
# As in engine.py: layers are alike.
SHAPE = ModelShape(num_layers=2)
ENGINE_BOUND, TRAINING_BOUND = 1.35, 1.2
# Of logits of the same weights in float32. A choice: half precision moves these logits, of std 4.5, by up to 0.2.
NEAR_TIES = {"float32": NEAR_TIE, "bfloat16": 0.5}
TRAINING = "training step"
# Lengths of the sequences of a step; steps are short, so some are timed together.
LENGTHS, STEPS_PER_TURN = (200, 200, 200, 200, 256), 2
QUICK_LENGTHS = (9, 9, 9, 9, 12)


@dataclass(frozen=True)
class Run:
    """One turn of one mode: seconds of processor time, of them `attach_s` before the first step, and the answers."""

    seconds: float
    attach_s: float = 0.0
    tokens: tuple[tuple[int, ...], ...] = ()
    logprobs: tuple[tuple[float, ...], ...] = ()


Runs = dict[str, dict[str, list[Run]]]  # by workload and mode


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = bench_parser(__doc__, budget_s=240).parse_args(given)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    shape, lengths = (QUICK_SHAPE, QUICK_LENGTHS) if args.quick else (SHAPE, LENGTHS)
    workloads = engine_workloads(shape, quick=args.quick)
    found: dict[str, Runs] = {}
    complaints: list[str] = []
    sections: list[tuple[str, str]] = []
    for dtype in DTYPES:
        bench = Bench(shape, dtype, lengths)
        if not bench.logits_are_those_of_sequences_alone():
            complaints.append(f"{dtype}: logits of the training forward differ between batches")
        runs = bench.rounds(workloads, args.budget_s / len(DTYPES), 1 if args.quick else args.rounds)
        told, num_near_ties = bench.disagreements(workloads, runs)
        complaints += told
        sections.append((f"{dtype}: seconds, and what they are of the default's", describe(runs, num_near_ties)))
        dearest = max(workloads, key=lambda w: ratio_of(runs[w.name]))
        for name, profiled in ((dearest.name, bench.shares(dearest)), (TRAINING, bench.shares_of_training())):
            sections.append((f"{dtype}, {name}: where the time goes", describe_shares(profiled)))
        found[dtype] = runs
    card: Path | None = None
    if complaints:
        say("\n".join(f"deterministic: {line}" for line in complaints))
        say("deterministic: no times: see above")
    else:
        lines = [f"- **{w.name}**: {w.described()}" for w in workloads]
        lines.append(
            f"- **{TRAINING}**: forward, loss over all tokens, backward and SGD for sequences of "
            f"{', '.join(map(str, lengths))} tokens, padded on the left; seconds are of one step"
        )
        sections.append(("Workloads", "\n".join(lines)))
        for heading, body in sections:
            say(f"{heading}\n\n{body}\n")
        resolved = {"model": shape_as_dict(shape), "seed_of_prompts": [1, 2, 3], "rounds": args.rounds}
        resolved |= {"budget_s": args.budget_s, "threads": 1, "near_ties": NEAR_TIES}
        card = write_card("deterministic", "What the deterministic mode costs", sections, resolved, args, given)
    print(json.dumps(summarize(found, complaints, card)), flush=True)
    return 1 if complaints else 0


class Bench:
    """Both modes on one model in one dtype."""

    def __init__(self, shape: ModelShape, dtype: str, lengths: Sequence[int]) -> None:
        self._dtype, self._shape = dtype, shape
        self._model = make_model(shape).to(getattr(torch, dtype))
        self._trained = copy.deepcopy(self._model).train()
        engine = Cpinfer(self._model, cpinfer.Topology.single(), shape, dtype=dtype)
        self._engines = {mode: replace(engine, deterministic=mode == DETERMINISTIC) for mode in MODES}
        self._sequences = [list(p) for p in random_prompts(lengths, shape.vocab_size, 4)]
        # Small: steps are timed, not what they lead to.
        self._optimizer = torch.optim.SGD(self._trained.parameters(), lr=1e-6)

    def rounds(self, workloads: Sequence[Workload], budget_s: float, max_rounds: int) -> Runs:
        """Turns of both modes. What a process does once (trials of products, compiling) is done before."""
        calls: dict[str, Callable[[str], Run]] = {w.name: partial(self._roll_out, w) for w in workloads}
        calls[TRAINING] = self._train
        for workload in engine_workloads(self._shape, quick=True):
            for mode in MODES:
                self._roll_out(workload, mode)
        for mode in MODES:
            self._train(mode)
        runs: Runs = {name: {mode: [] for mode in MODES} for name in calls}
        start_s, done = time.perf_counter(), 0
        while has_time_for_another(done, time.perf_counter() - start_s, budget_s, max_rounds):
            for name, call in calls.items():
                for mode in rotated(MODES, done):
                    runs[name][mode].append(call(mode))
                    say(f"deterministic: {self._dtype}, round {done + 1}, {name}, {mode}")
            done += 1
        return runs

    def _roll_out(self, workload: Workload, mode: str, profiler: cProfile.Profile | None = None) -> Run:
        engine_of = self._engines[mode]
        start_s = time.process_time()
        with cpinfer.attach(self._model, engine_of.topology, engine_of.config(workload)) as engine:
            attach_s = time.process_time() - start_s
            with profiler or nullcontext():
                results = engine_of.results(engine, workload)
        seconds = time.process_time() - start_s
        tokens = tuple(tuple(r.token_ids) for r in results)
        return Run(seconds, attach_s, tokens, tuple(tuple(r.logprobs) for r in results))

    def _train(self, mode: str) -> Run:
        start_s = time.process_time()
        for _ in range(STEPS_PER_TURN):
            self._step(mode)
        return Run((time.process_time() - start_s) / STEPS_PER_TURN)

    def _step(self, mode: str) -> None:
        ids, mask = padded(self._sequences)
        logits = self._logits(self._trained, ids, mask, mode)
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten()).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _logits(self, model: Any, ids: Tensor, mask: Tensor, mode: str) -> Tensor:
        with cpinfer.invariant_training(model) if mode == DETERMINISTIC else nullcontext():
            logits: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
        return logits

    @torch.no_grad()
    def logits_are_those_of_sequences_alone(self, mode: str = DETERMINISTIC) -> bool:
        """Bit for bit, of the whole batch beside batches of one."""
        together = self._logits(self._model, *padded(self._sequences), mode)
        return all(
            torch.equal(row[-len(tokens) :], self._logits(self._model, *padded([tokens]), mode)[0])
            for row, tokens in zip(together, self._sequences, strict=True)
        )

    def disagreements(self, workloads: Sequence[Workload], runs: Runs) -> tuple[list[str], int]:
        """What is wrong with the answers, in words, and how many samples of the default mode part at a near-tie."""
        whole = copy.deepcopy(self._model).float()
        complaints, num_near_ties = [], 0
        for workload in workloads:
            of = runs[workload.name]
            complaints += [f"{self._dtype}, {told}" for told in unequal_rounds(workload.name, of[DETERMINISTIC])]
            first = of[DETERMINISTIC][0].tokens
            for i, margin in partings(whole, workload, of[DEFAULT][0].tokens, first):
                if margin <= NEAR_TIES[self._dtype]:
                    num_near_ties += 1
                else:
                    complaints.append(
                        f"{self._dtype}, {workload.name}: sample {i} of the default mode parts where one token's logit "
                        f"is {margin:.3g} above the other's"
                    )
        return complaints, num_near_ties

    def shares(self, workload: Workload) -> dict[str, dict[str, float]]:
        """Of one more run in each mode, as `shares_of` has them."""
        found = {}
        for mode in MODES:
            profiler = cProfile.Profile(time.process_time)
            self._roll_out(workload, mode, profiler)
            found[mode] = shares_of(profiler)
        return found

    def shares_of_training(self) -> dict[str, dict[str, float]]:
        """Of one more step in each mode."""
        found = {}
        for mode in MODES:
            with cProfile.Profile(time.process_time) as profiler:
                self._step(mode)
            found[mode] = shares_of(profiler)
        return found


def padded(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `[B, T]`, padded on the left."""
    T = max(map(len, sequences))
    ids = torch.tensor([[0] * (T - len(s)) + s for s in sequences])
    return ids, torch.tensor([[0] * (T - len(s)) + [1] * len(s) for s in sequences])


def unequal_rounds(name: str, runs: Sequence[Run]) -> list[str]:
    """Complaints about rounds whose tokens or logprobs are not those of the first, in every bit."""
    first = runs[0]
    return [
        f"{name}: round {i + 1} of the deterministic mode is not the first, bit for bit"
        for i, run in enumerate(runs)
        if (run.tokens, run.logprobs) != (first.tokens, first.logprobs)
    ]


# Functions that do not call each other but where a part's own do, by file and name, each with all that it calls.
WITHIN = {
    "attention": {
        ("cpu_backend.py", "run"),
        ("ordered_attention.py", "run"),
        ("ordered_attention.py", "states"),
        ("ordered_attention.py", "merge_ordered"),
        ("sdpa_attention.py", "sdpa_attention_forward"),
        ("invariant_training.py", "forward"),
    },
    "functions of single numbers": {("row_pointwise.py", "pointwise_by_rows")},
    "backward": {("~", "<method 'run_backward' of 'torch._C._EngineBase' objects>")},
}
PRODUCT, BY_ROWS = ("~", "<built-in method torch._C._nn.linear>"), ("row_sizes.py", "linear_by_rows")
PRODUCTS, CUTTING = "products with weights", "cutting and padding their rows"
DISPATCH, REST = "standing in for torch's functions", "the rest"


def shares_of(profiler: cProfile.Profile) -> dict[str, float]:
    """Seconds by what they were spent on; together, all of them. Profiling itself slows small functions."""
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    found = dict.fromkeys([PRODUCTS, CUTTING, *WITHIN, DISPATCH], 0.0)
    for function, (_, _, own_s, all_s, callers) in stats.items():
        place = _place(function)
        for part, places in WITHIN.items():
            if place in places and not any(_place(caller) in places for caller in callers):
                found[part] += all_s
        if place == PRODUCT:
            found[PRODUCTS] += own_s
            found[CUTTING] -= sum(by[2] for caller, by in callers.items() if _place(caller)[0] == BY_ROWS[0])
        elif place == BY_ROWS:
            found[CUTTING] += all_s
        elif place[0] == "invariant_rows.py":
            found[DISPATCH] += own_s
    found[REST] = sum(own_s for _, _, own_s, _, _ in stats.values()) - sum(found.values())
    return found


def _place(function: tuple[str, int, str]) -> tuple[str, str]:
    path, _, name = function
    return Path(path).name, name


def describe(runs: Runs, num_near_ties: int) -> str:
    rows = []
    for name, of in runs.items():
        timings = {mode: Timing(tuple(run.seconds for run in of[mode])) for mode in MODES}
        ratio, bound = ratio_of(of), bound_of(name)
        attach_s = Timing(tuple(run.attach_s for run in of[DETERMINISTIC])).median_s
        told = "" if name == TRAINING else f"{attach_s:.2f} s"
        verdict = f"{bound:g}" if ratio <= bound else f"{bound:g}: **over**"
        rows.append([name, *map(str, timings.values()), told, f"{ratio:.2f}", verdict])
    header = ["workload", *MODES, "of it attaching", "ratio", "bound"]
    return table(header, rows) + (
        "\n\nSeconds are medians (min..max) of processor time, attaching the engine included. Every round of the "
        "deterministic mode gave "
        f"the same tokens and the same bits of every logprob; {num_near_ties} samples of the default mode parted from "
        "them at a near-tie, none otherwise. Logits of the training forward were those of each sequence alone, bit for "
        "bit."
    )


def ratio_of(of: dict[str, list[Run]]) -> float:
    medians = [Timing(tuple(run.seconds for run in of[mode])).median_s for mode in MODES]
    return medians[1] / medians[0]


def bound_of(name: str) -> float:
    return TRAINING_BOUND if name == TRAINING else ENGINE_BOUND


def describe_shares(shares: dict[str, dict[str, float]]) -> str:
    totals = {mode: sum(of.values()) for mode, of in shares.items()}
    rows = [
        [part, *(f"{shares[mode][part]:.3f} s ({shares[mode][part] / totals[mode]:.0%})" for mode in MODES)]
        for part in shares[DEFAULT]
        if any(shares[mode][part] for mode in MODES)
    ]
    rows.append(["all", *(f"{totals[mode]:.3f} s" for mode in MODES)])
    return table(["one run under cProfile", *MODES], rows)


def summarize(found: dict[str, Runs], complaints: Sequence[str], card: Path | None) -> dict[str, Any]:
    """The last line of stdout. Ratios are null where answers are not as they must be."""
    return {
        "benchmark": "deterministic",
        "answers_agree": not complaints,
        **{
            dtype: {
                name: {
                    "ratio": None if complaints else ratio_of(of),
                    "bound": bound_of(name),
                    "num_rounds": len(of[DEFAULT]),
                }
                for name, of in runs.items()
            }
            for dtype, runs in found.items()
        },
        "card": None if card is None else str(card),
    }


if __name__ == "__main__":
    sys.exit(main())
