"""How work scales over ranks: prefill over pcp, decode over dcp, and the longest sequence over dcp.

    python tools/bench/scaling.py               # minutes; writes a card to tools/bench/results/
    python tools/bench/scaling.py --quick       # seconds; tiny, no card: only shows that it works

- prefill: one long prompt on one process of 1 thread, and on two with pcp=2
- decode: steps at a long context, the cache filled with random K and V, at dcp=1 on one process and dcp=2 on two
- capacity: the longest sequence that runs at dcp 1, 2 and 4 with the same bytes of KV per rank

Two processes share caches, memory and turbo, so twice the speed may be out of reach whatever the software does. What
*is* in reach is measured: two independent copies of the work run at once, one per process. They bound the speed-up by

    alone * (1 / copy on rank 0 + 1 / copy on rank 1)

Alone, copies and split take turns within a round. All answers are compared before any time is printed: prefill with
plain Transformers, decode at dcp=2 with dcp=1 on the same logical KV. Exit 1 when they differ.

A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpinfer_tools.measuring.harness import (
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
    FLOAT32_BYTES,
    QUICK_SHAPE,
    ModelShape,
    make_model,
    random_prompts,
    shape_as_dict,
)

if TYPE_CHECKING:
    import cpinfer
    from talk import Talk

NUM_RANKS = 2
BLOCK_SIZE = 16
WAYS = ("alone", "copies", "split")
PREFILL_TARGET = 0.9
CAPACITY_TARGET = 0.98
# Of logprobs, between layouts that sum in different orders.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """How large the measured work is."""

    shape: ModelShape
    prompt_tokens: int
    context_tokens: int
    batches: tuple[int, ...]
    capacity_bytes: int


FULL = Size(ModelShape(), prompt_tokens=16384, context_tokens=65536, batches=(1, 8), capacity_bytes=2**20)
QUICK = Size(QUICK_SHAPE, prompt_tokens=512, context_tokens=1024, batches=(1, 2), capacity_bytes=2**16)


@dataclass(frozen=True)
class Scaling:
    """Times of the same work alone on a rank, as copies on both ranks at once, and split over both."""

    alone: Timing
    copies: tuple[Timing, Timing]
    split: Timing

    @property
    def speedup(self) -> float:
        return self.alone.median_s / self.split.median_s

    @property
    def reachable(self) -> float:
        """The speed-up of two processes that share nothing but the machine."""
        return sum(self.alone.median_s / copy.median_s for copy in self.copies)

    @property
    def efficiency(self) -> float:
        return self.speedup / self.reachable


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("scaling", parse_args(argv), argv, bench, work)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the workers, compare, then tell: table, card, summary."""
    size = QUICK if args.quick else FULL
    task = {"quick": args.quick, "rounds": 2 if args.quick else args.rounds, "budget_s": args.budget_s}
    outcome = run_workers(Path(__file__).resolve(), NUM_RANKS, task, timeout_s=300 + 2 * args.budget_s)
    capacity = capacities(size)
    sections = describe(outcome, capacity, size)
    complaints = list(outcome["complaints"])
    if complaints:
        say("scaling: no times, the answers are not the oracle's:\n" + "\n".join(complaints))
    else:
        say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
    card = None
    if not complaints:
        resolved = {**dataclasses.asdict(size), "model": shape_as_dict(size.shape), "block_size": BLOCK_SIZE}
        del resolved["shape"]
        resolved |= {"rounds": task["rounds"], "budget_s": args.budget_s, "threads_per_process": 1, "dtype": "float32"}
        title = "Prefill over pcp, decode and capacity over dcp"
        card = write_card("scaling", title, sections, resolved, args, argv)
    print(json.dumps(summarize(outcome, capacity, size, card)), flush=True)
    return 1 if complaints else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return bench_parser(__doc__, budget_s=300).parse_args(argv)


def work(task: dict[str, Any]) -> int:
    """One rank: prefill, then decode; rank 0 writes what came of them."""
    import torch
    import transformers

    import cpinfer
    from cpinfer.comm.axis import CountingComm
    from cpinfer.comm.bootstrap import Launch, default_group
    from cpinfer.config import EngineConfig
    from cpinfer.engine.collectives import collectives_in_shared_memory
    from cpinfer.layout.grid import RankGrid
    from talk import Talk

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    launch = Launch.from_environ(os.environ)
    size = QUICK if task["quick"] else FULL
    complaints: list[str] = []
    with default_group(launch):
        talk = Talk(launch.rank, launch.world_size)
        model = make_model(size.shape)
        both = cpinfer.Topology.from_world(RankGrid(pcp_size=NUM_RANKS, dcp_size=NUM_RANKS))
        with collectives_in_shared_memory(both, EngineConfig()) as shared:  # as engines do
            counted = dataclasses.replace(shared, pcp=CountingComm(shared.pcp), dcp=CountingComm(shared.dcp))
            prefill = measure_prefill(task, size, model, counted, talk, complaints)
            decode = {
                str(batch): measure_decode(task, size, batch, model, counted, talk, complaints)
                for batch in size.batches
            }
        everyone = [line for lines in talk.all(complaints) for line in lines]
        if launch.rank == 0:
            outcome = {"prefill": prefill, "decode": decode, "complaints": everyone}
            Path(task["output"]).write_text(json.dumps(outcome), encoding="utf-8")
        both.close()
    return 0


def take_turns(
    name: str, talk: Talk, max_rounds: int, budget_s: float, run: Callable[[bool], Any]
) -> dict[str, dict[str, Any]]:
    """Seconds of every rank and what `run(split)` gave last, for each of the three ways, by turns, after a warm-up.

    `run(False)` does all the work in this process, `run(True)` this rank's share of it.
    """
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    results: dict[str, Any] = {}
    # The first call allocates, and touches weights and cache for the first time.
    run(True)
    run(False)
    start_s, rounds = time.perf_counter(), 0
    while talk.first(has_time_for_another(rounds, time.perf_counter() - start_s, budget_s, max_rounds)):
        for way in rotated(WAYS, rounds):
            talk.barrier()
            taken_s = 0.0
            if way != "alone" or talk.rank == 0:
                # Own clock of each rank: copies are not to wait for each other. A split run ends on all ranks at once,
                # since its collectives do.
                results[way], taken_s = timed(partial(run, way == "split"), lambda: None)
            each = talk.all(taken_s)
            seconds[way].append(each)
            if talk.rank == 0:
                say(f"scaling: {name}, round {rounds + 1}, {way}: {max(each):.4g} s")
        rounds += 1
    return {"seconds": seconds, "results": results}


def scaling_of(seconds: dict[str, list[list[float]]]) -> Scaling:
    """What `take_turns` measured. Of a split run the slowest rank counts."""
    return Scaling(
        alone=Timing(tuple(each[0] for each in seconds["alone"])),
        copies=(Timing(tuple(each[0] for each in seconds["copies"])), Timing(tuple(e[1] for e in seconds["copies"]))),
        split=Timing(tuple(max(each) for each in seconds["split"])),
    )


def measure_prefill(
    task: dict[str, Any], size: Size, model: Any, both: cpinfer.Topology, talk: Talk, complaints: list[str]
) -> dict[str, Any]:
    """Time to the first token of one long prompt, through the engine."""
    import torch

    import cpinfer
    from cpinfer.config import EngineConfig, SamplingParams
    from cpinfer.layout.capacity import KVLayout
    from cpinfer.layout.prefill import zigzag_split
    from cpinfer.layout.traffic import prefill_bytes

    [prompt] = random_prompts([size.prompt_tokens], size.shape.vocab_size, 4)
    sampling = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
    blocks = size.prompt_tokens // BLOCK_SIZE + 2

    config = EngineConfig(
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_gib=blocks * BLOCK_SIZE * size.shape.kv_bytes_per_token / 2**30,
        max_num_batched_tokens=size.prompt_tokens,
        enable_prefix_caching=False,  # every round has to compute the prompt
    )
    # A model serves one engine at a time: modules of its own for each, on the same weights.
    beside = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    with (
        cpinfer.attach(model, cpinfer.Topology.single(), config) as one,
        cpinfer.attach(beside, both, config) as shared,
    ):
        turns = take_turns(
            "prefill",
            talk,
            task["rounds"],
            task["budget_s"] * 0.6,
            lambda split: (shared if split else one).generate([list(prompt)], sampling)[0],
        )
        traffic = both.pcp.traffic  # type: ignore[attr-defined]
        traffic.received_bytes = 0
        shared.generate([list(prompt)], sampling)
        received = traffic.received_bytes
    if talk.rank == 0:
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1).logits[0, -1]
        oracle = torch.log_softmax(logits, dim=-1)
        for way, result in turns["results"].items():
            token = result.token_ids[0]
            if token != int(oracle.argmax()) or abs(result.logprobs[0] - float(oracle[token])) > TOLERANCE:
                complaints.append(
                    f"prefill, {way}: token {token}, logprob {result.logprobs[0]:.6f}; Transformers: {oracle.max():.6f}"
                )
    split = zigzag_split([size.prompt_tokens], NUM_RANKS)
    pairs = split.pairs_per_rank()
    return {
        "seconds": turns["seconds"],
        "work_imbalance": max(pairs) * len(pairs) / sum(pairs),
        "bytes_per_layer": received / size.shape.num_layers,
        "bytes_per_layer_formula": prefill_bytes(
            NUM_RANKS,
            split.part_len,
            KVLayout(size.shape.num_kv_heads, size.shape.head_dim, size.shape.head_dim),
            FLOAT32_BYTES,
        ),
    }


def measure_decode(
    task: dict[str, Any],
    size: Size,
    batch: int,
    model: Any,
    both: cpinfer.Topology,
    talk: Talk,
    complaints: list[str],
) -> dict[str, Any]:
    """A decode step of `batch` sequences, sampling and agreement included, over caches filled with the same KV."""
    import cpinfer
    from cpinfer.engine.attach import model_spec
    from cpinfer.layout.capacity import KVLayout
    from cpinfer.layout.traffic import decode_bytes
    from cpinfer.models.runner import attached
    from decode_steps import DecodeSteps

    rows = -(-batch // NUM_RANKS)
    with attached(model, model_spec(model), 1) as runner:
        steps = {
            False: DecodeSteps(runner, cpinfer.Topology.single(), size.context_tokens, batch, BLOCK_SIZE),
            True: DecodeSteps(runner, both, size.context_tokens, batch, BLOCK_SIZE),
        }
        # Batches are checked once, then timed often: a step is short.
        turns = take_turns(
            f"decode, batch {batch}", talk, 40, task["budget_s"] * 0.15, lambda split: steps[split].run()
        )
        traffic = both.dcp.traffic  # type: ignore[attr-defined]
        traffic.received_bytes = 0
        steps[True].run()
        received = traffic.received_bytes
        lens = steps[True].local_lens
    if talk.rank == 0:
        for own, shared in zip(turns["results"]["alone"], turns["results"]["split"], strict=True):
            if own.token_id != shared.token_id or abs(own.logprob - shared.logprob) > TOLERANCE:
                complaints.append(f"decode, batch {batch}: dcp=2 gives {shared}, dcp=1 {own}")
    shape = size.shape
    weights = (shape.params_per_token + shape.vocab_params) * FLOAT32_BYTES
    kv = shape.kv_bytes_per_token * (size.context_tokens + 1) * batch
    exchanged = decode_bytes(
        NUM_RANKS,
        rows,
        shape.num_q_heads,
        KVLayout(shape.num_kv_heads, shape.head_dim, shape.head_dim),
        FLOAT32_BYTES,
        sends_new_kv=True,
    )
    return {
        "seconds": turns["seconds"],
        "read_bytes_alone": weights + kv,
        "read_bytes_split": weights + shape.kv_bytes_per_token * max(lens) * batch,
        "work_imbalance": max(lens) * NUM_RANKS / sum(lens),
        "bytes_per_layer": received / shape.num_layers,
        "bytes_per_layer_formula": exchanged.total,
    }


def capacities(size: Size, dcp_sizes: Sequence[int] = (1, 2, 4)) -> dict[int, int]:
    """The longest sequence at each dcp with the same bytes of KV per rank, as the engine has it: found by asking.

    Ranks are threads of this process. A prompt that fills the pool up to one token, and that token, are run for real;
    RuntimeError when they cannot be, or when one token more can.
    """
    import cpinfer
    from cpinfer.comm.threads import run_ranks
    from cpinfer.config import EngineConfig, SamplingParams
    from cpinfer.errors import UserError
    from cpinfer.layout.grid import RankGrid

    # The smallest model: only the bytes of its KV count.
    model = make_model(QUICK_SHAPE)
    longest = {}
    config = EngineConfig(
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_gib=size.capacity_bytes / 2**30,
        max_num_batched_tokens=2**20,
    )
    for dcp in dcp_sizes:

        def ask(topology: cpinfer.Topology) -> int:
            with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
                # The last token of an answer is never cached, so two new tokens take one place.
                params = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
                full = engine.kv_capacity_tokens
                [result] = engine.generate([[1] * (full - 1)], params)
                if len(result.token_ids) != 2:
                    raise RuntimeError(f"a sequence of {full} tokens ended early")
                try:
                    engine.generate([[1] * full], params)
                except UserError:
                    return full
            raise RuntimeError(f"the pool holds {full} tokens, yet a sequence of {full + 1} was run")

        longest[dcp] = run_ranks(RankGrid(pcp_size=dcp, dcp_size=dcp), ask)[0]
    return longest


def describe(outcome: dict[str, Any], capacity: dict[int, int], size: Size) -> tuple[tuple[str, str], ...]:
    """The card's sections."""
    prefill, rows = scaling_of(outcome["prefill"]["seconds"]), []
    rows.append([f"prefill of {size.prompt_tokens:,} tokens, pcp=2", *_cells(prefill), "2.00"])
    for batch, measured in outcome["decode"].items():
        by_bytes = measured["read_bytes_alone"] / measured["read_bytes_split"]
        name = f"decode at {size.context_tokens:,} tokens, batch {batch}, dcp=2"
        rows.append([name, *_cells(scaling_of(measured["seconds"])), f"{by_bytes:.2f}"])
    header = ["work", "one rank", "two copies at once", "split over two", "speed-up", "reachable", "of it", "on paper"]
    verdict = "reached" if prefill.efficiency >= PREFILL_TARGET else "NOT reached"
    speed = (
        f"{table(header, rows)}\n\nReachable: what two independent copies reach together. On paper: prefill halves the "
        "arithmetic; decode halves the bytes of KV, while each rank reads all weights. Prefill is timed through "
        "`generate` with one new token, decode as the engine's whole step (plan, model, sampling, agreement). "
        f"Prefill target: {PREFILL_TARGET:g} of reachable: **{verdict}** ({prefill.efficiency:.2f})."
    )
    counted = [
        [name, f"{m['work_imbalance']:.4f}", f"{m['bytes_per_layer']:,.0f}", f"{m['bytes_per_layer_formula']:,}"]
        for name, m in [
            ("prefill, pcp=2", outcome["prefill"]),
            *((f"decode, batch {batch}, dcp=2", m) for batch, m in outcome["decode"].items()),
        ]
    ]
    balance = table(["step", "max/mean attention work", "bytes per layer, counted", "by formula"], counted)
    balance += (
        "\n\nBytes that one rank receives from the other (and, at two ranks, sends to it). Formulas: prefill "
        "`(pcp-1) * part * 2*kvl * D * b`; decode `(dcp-1) * R * ((hq + 2*kvl) * D * b + hq * (D*b + 4))`, R rows of a "
        "rank. Work: query-key pairs in prefill, keys of a shard in decode."
    )
    one = capacity[1]
    held = [[str(n), f"{tokens:,}", f"{tokens / (n * one):.4f}"] for n, tokens in capacity.items()]
    room = table(["dcp", "longest sequence, tokens", "of dcp times dcp=1"], held)
    reached = all(tokens >= CAPACITY_TARGET * n * one for n, tokens in capacity.items())
    room += (
        f"\n\n{size.capacity_bytes:,} bytes of KV per rank, the smallest model, ranks as threads. A sequence of this "
        f"length was run, one token more was refused. Target {CAPACITY_TARGET:g}: "
        f"**{'reached' if reached else 'NOT reached'}**."
    )
    return (
        ("Speed, 1 thread per process", speed),
        ("Balance and traffic", balance),
        ("Capacity at equal bytes per rank", room),
    )


def _cells(scaling: Scaling) -> list[str]:
    copies = " / ".join(f"{copy.median_s:.3g}" for copy in scaling.copies)
    figures = f"{scaling.speedup:.2f}", f"{scaling.reachable:.2f}", f"{scaling.efficiency:.0%}"
    return [str(scaling.alone), f"{copies} s", str(scaling.split), *figures]


def summarize(outcome: dict[str, Any], capacity: dict[int, int], size: Size, card: Path | None) -> dict[str, Any]:
    """The last line of stdout. Times are null when answers differ."""
    agree = not outcome["complaints"]

    def figures(measured: dict[str, Any]) -> dict[str, Any]:
        scaling = scaling_of(measured["seconds"])
        return {
            "alone_s": scaling.alone.median_s if agree else None,
            "split_s": scaling.split.median_s if agree else None,
            "speedup": scaling.speedup if agree else None,
            "reachable_speedup": scaling.reachable if agree else None,
            "of_reachable": scaling.efficiency if agree else None,
            **{key: value for key, value in measured.items() if key != "seconds"},
        }

    return {
        "benchmark": "scaling",
        "answers_agree": agree,
        "prefill_tokens": size.prompt_tokens,
        "prefill": figures(outcome["prefill"]),
        "decode_context_tokens": size.context_tokens,
        **{f"decode_batch_{batch}": figures(measured) for batch, measured in outcome["decode"].items()},
        "longest_sequence_tokens": {f"dcp{n}": tokens for n, tokens in capacity.items()},
        "card": None if card is None else str(card),
    }


if __name__ == "__main__":
    sys.exit(main())
