"""Models of linear attention: prefill over pcp, and decode beside Transformers `generate`.

    python tools/bench/hybrids.py               # minutes; writes a card to tools/bench/results/
    python tools/bench/hybrids.py --quick       # seconds; tiny, no card: only shows that it works

- prefill: one prompt on one process of 1 thread, two copies of that at once, and split over both with pcp=2
- decode: steps of 1, 8 and 64 sequences on one process of 1 thread, this engine and `generate`

A random model as Qwen3.5's text models are: three layers of the gated delta rule for one of softmax attention, the rule
by Transformers' own code in torch. A rank whose piece is not a prompt's first runs the rule over wider values, so the
speed-up on paper is less than the ranks. Answers are compared with Transformers' before any time is printed; exit 1
when they differ. A decode step's time is that of an answer less that of its first token, by its other tokens.

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
from operator import methodcaller
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
    NEAR_TIE,
    ModelShape,
    Speed,
    Workload,
    measure_speed,
    normal,
    partings,
    peaked_stds,
    random_model,
    random_prompts,
)
from scaling import NUM_RANKS, TOLERANCE, scaling_of, take_turns

if TYPE_CHECKING:
    from talk import Talk

OURS, PEER = "cpinfer", "generate"
# As many layers of linear attention stand before each of softmax attention.
NUM_LINEAR = 3
CHUNK = 64  # tokens that the rule takes together


@dataclass(frozen=True)
class HybridShape:
    """A random model of layers of both kinds, in float32. `softmax`: of the layers of softmax attention."""

    softmax: ModelShape
    num_k_heads: int
    num_v_heads: int
    head_dim: int
    conv_width: int = 4

    @property
    def num_linear_layers(self) -> int:
        return NUM_LINEAR * self.softmax.num_layers

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return (2 * self.num_k_heads + self.num_v_heads) * self.head_dim

    @property
    def params_per_token(self) -> int:
        """Weights that multiply every token, the vocabulary aside; gates of the queries among them."""
        shape = self.softmax
        gates = shape.hidden_size * shape.num_q_heads * shape.head_dim
        v_dim = self.num_v_heads * self.head_dim
        linear = (
            shape.hidden_size * (self.channels + 2 * v_dim + 2 * self.num_v_heads) + self.conv_width * self.channels
        )
        mlp = 3 * shape.hidden_size * shape.intermediate_size
        return shape.params_per_token + shape.num_layers * gates + self.num_linear_layers * (linear + mlp)

    @property
    def state_bytes(self) -> int:
        """Of one sequence: states, and the last inputs of the convolution."""
        values = self.num_v_heads * self.head_dim**2 + (self.conv_width - 1) * self.channels
        return self.num_linear_layers * values * FLOAT32_BYTES

    def rule_flops(self, num_tokens: int, *, is_open: bool = False) -> float:
        """Of the rule over chunks: products within one, two triangular systems, and with the state; wider if open."""
        k, v = self.head_dim, self.head_dim * (2 if is_open else 1)
        per_token = 4 * CHUNK * k + CHUNK * (k + v) + 2 * CHUNK * v + 6 * k * v
        return float(self.num_linear_layers * self.num_v_heads * num_tokens * per_token)

    def prefill_flops(self, num_tokens: int) -> list[float]:
        """Of a prompt on one rank, then of each of two ranks that have split it: piece 0 and 3, and 1 and 2."""
        shape = self.softmax
        pairs = num_tokens * (num_tokens + 1) // 2
        rest = 2.0 * self.params_per_token * num_tokens + shape.flops_per_pair * pairs
        quarter, half = num_tokens // 4, num_tokens // 2
        first = self.rule_flops(quarter) + self.rule_flops(quarter, is_open=True)
        return [rest + self.rule_flops(num_tokens), rest / 2 + first, rest / 2 + self.rule_flops(half, is_open=True)]

    def step_floor_s(self, speed: Speed, batch: int, context_tokens: int) -> float:
        """The least time of a decode step: weights once, each sequence's states read and written, its KV read."""
        shape = self.softmax
        params = self.params_per_token + shape.vocab_params
        num_bytes = params * FLOAT32_BYTES + batch * (2 * self.state_bytes + shape.kv_bytes_per_token * context_tokens)
        rule = 8.0 * self.num_linear_layers * self.num_v_heads * self.head_dim**2
        flops = batch * (2.0 * params + rule + shape.flops_per_pair * context_tokens)
        return max(flops / (speed.gflop_per_s * 1e9), num_bytes / (speed.gbyte_per_s * 1e9))


@dataclass(frozen=True)
class Size:
    """How large the measured work is."""

    shape: HybridShape
    prompt_tokens: int
    batches: tuple[int, ...]
    context_tokens: int
    new_tokens: int

    def workload(self, batch: int, num_new: int) -> Workload:
        """Prompts of one length, each answered with so many tokens."""
        prompts = random_prompts([self.context_tokens] * batch, self.shape.softmax.vocab_size, 5)
        return Workload(f"{batch} sequences", prompts, (num_new,) * batch)


FULL = Size(
    HybridShape(ModelShape(num_layers=1), num_k_heads=4, num_v_heads=8, head_dim=64),
    prompt_tokens=16384,
    batches=(1, 8, 64),
    context_tokens=128,
    new_tokens=33,
)
QUICK = Size(
    HybridShape(ModelShape(1, 64, 96, 4, 2, 16, 128), num_k_heads=2, num_v_heads=4, head_dim=16),
    prompt_tokens=512,
    batches=(1, 2),
    context_tokens=24,
    new_tokens=5,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("hybrids", parse_args(argv), argv, bench, work)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the workers, compare, then tell: table, card, summary."""
    size = QUICK if args.quick else FULL
    task = {"quick": args.quick, "rounds": 2 if args.quick else args.rounds, "budget_s": args.budget_s / 2}
    found = {
        part: run_workers(
            Path(__file__).resolve(), num_ranks, {**task, "part": part}, timeout_s=900 + 2 * args.budget_s
        )
        for part, num_ranks in (("prefill", NUM_RANKS), ("decode", 1))
    }
    complaints = [line for outcome in found.values() for line in outcome["complaints"]]
    sections = describe(found, size)
    card = None
    if complaints:
        say("hybrids: no times, the answers are not the oracle's:\n" + "\n".join(complaints))
    else:
        say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
        resolved = {**dataclasses.asdict(size), "rounds": task["rounds"], "budget_s": args.budget_s}
        resolved |= {"threads_per_process": 1, "dtype": "float32"}
        card = write_card("hybrids", "Models of linear attention: prefill and decode", sections, resolved, args, argv)
    print(json.dumps(summarize(found, size, agreed=not complaints, card=card)), flush=True)
    return 1 if complaints else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return bench_parser(__doc__, budget_s=600).parse_args(argv)


def work(task: dict[str, Any]) -> int:
    """One rank of one part; rank 0 writes what came of it."""
    import torch
    import transformers

    from cpinfer.comm.bootstrap import Launch, default_group
    from talk import Talk

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        talk = Talk(launch.rank, launch.world_size)
        outcome = (measure_prefill if task["part"] == "prefill" else measure_decode)(task, talk)
        if launch.rank == 0:
            Path(task["output"]).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def make_model(shape: HybridShape) -> Any:
    """The same on every call and rank. Attention is peaked, states last, and no token ends a text."""
    from transformers import AutoConfig

    softmax = shape.softmax
    config = AutoConfig.for_model(
        "qwen3_5_text",
        num_hidden_layers=softmax.num_layers + shape.num_linear_layers,
        layer_types=[*["linear_attention"] * NUM_LINEAR, "full_attention"] * softmax.num_layers,
        hidden_size=softmax.hidden_size,
        intermediate_size=softmax.intermediate_size,
        num_attention_heads=softmax.num_q_heads,
        num_key_value_heads=softmax.num_kv_heads,
        head_dim=softmax.head_dim,
        vocab_size=softmax.vocab_size,
        linear_num_key_heads=shape.num_k_heads,
        linear_num_value_heads=shape.num_v_heads,
        linear_key_head_dim=shape.head_dim,
        linear_value_head_dim=shape.head_dim,
        linear_conv_kernel_dim=shape.conv_width,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    stds = peaked_stds(softmax.hidden_size)
    # Queries and keys are normed: the norm's weights make logits peaked, not these.
    of_rule = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    stds |= dict.fromkeys(("q_proj", "k_proj", *of_rule), stds["o_proj"])
    draws: dict[str, Callable[[Any], object]] = {**normal(stds)}
    draws |= {"q_norm": methodcaller("add_", 2), "A_log": methodcaller("uniform_", -5, -2)}
    return random_model(config, softmax.seed, draws)


def measure_prefill(task: dict[str, Any], talk: Talk) -> dict[str, Any]:
    """Time to the first token of one long prompt, through the engine, in each of the three ways."""
    import torch

    import cpinfer
    from cpinfer.config import EngineConfig, SamplingParams
    from cpinfer.layout.grid import RankGrid

    size = QUICK if task["quick"] else FULL
    model, complaints = make_model(size.shape), []
    [prompt] = random_prompts([size.prompt_tokens], size.shape.softmax.vocab_size, 4)
    sampling = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
    config = EngineConfig(dtype="float32", kv_cache_gib=0.25, max_num_seqs=2, max_num_batched_tokens=size.prompt_tokens)
    both = cpinfer.Topology.from_world(RankGrid(pcp_size=NUM_RANKS, dcp_size=NUM_RANKS))
    # A model serves one engine at a time: modules of its own for each, on the same weights.
    beside = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    speeds = [measure_speed(size.shape.softmax)]
    with (
        cpinfer.attach(model, cpinfer.Topology.single(), config) as one,
        cpinfer.attach(beside, both, config) as shared,
    ):
        turns = take_turns(
            "prefill", talk, task["rounds"], task["budget_s"],
            lambda split: (shared if split else one).generate([list(prompt)], sampling)[0],
        )  # fmt: skip
    speeds.append(measure_speed(size.shape.softmax))
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
    best = talk.all(max(speed.gflop_per_s for speed in speeds))
    both.close()
    return {"seconds": turns["seconds"], "gflop_per_s": min(best), "complaints": complaints}


def measure_decode(task: dict[str, Any], talk: Talk) -> dict[str, Any]:
    """Seconds of a decode step of each batch, of this engine and of `generate`, by turns."""
    import cpinfer
    from cpinfer.config import EngineConfig
    from cpinfer_tools.measuring.contestants import Cpinfer, Generate, attention_restored

    size = QUICK if task["quick"] else FULL
    model, beside = (make_model(size.shape) for _ in range(2))
    ours, peer = Cpinfer(model, cpinfer.Topology.single(), size.shape.softmax), Generate(beside)
    config = EngineConfig(dtype="float32", kv_cache_gib=1.0, max_num_seqs=max(size.batches))
    seconds: dict[str, dict[str, list[float]]] = {str(b): {OURS: [], PEER: []} for b in size.batches}
    answers: dict[str, list[Any]] = {}
    speeds, complaints = [measure_speed(size.shape.softmax)], []
    with cpinfer.attach(model, config=config) as engine, attention_restored(beside.config):
        runs = {OURS: lambda w: [list(r.token_ids) for r in ours.results(engine, w)], PEER: peer.run}
        for run in runs.values():  # the first call allocates
            run(size.workload(size.batches[0], 2))
        start_s, rounds = time.perf_counter(), 0
        while has_time_for_another(rounds, time.perf_counter() - start_s, task["budget_s"], task["rounds"]):
            for batch in size.batches:
                for name in rotated(list(runs), rounds):
                    _, first_s = timed(partial(runs[name], size.workload(batch, 1)), talk.barrier)
                    found, all_s = timed(partial(runs[name], size.workload(batch, size.new_tokens)), talk.barrier)
                    seconds[str(batch)][name].append((all_s - first_s) / (size.new_tokens - 1))
                    answers.setdefault(f"{batch} {name}", found)
                    say(f"hybrids: decode, round {rounds + 1}, {batch} sequences, {name}: {all_s - first_s:.3g} s")
            rounds += 1
    speeds.append(measure_speed(size.shape.softmax))
    for batch in size.batches:
        workload = size.workload(batch, size.new_tokens)
        parted = partings(beside, workload, answers[f"{batch} {OURS}"], answers[f"{batch} {PEER}"])
        complaints += [f"decode, {batch} sequences: sample {i} differs" for i, margin in parted if margin > NEAR_TIE]
    best = Speed(max(s.gflop_per_s for s in speeds), max(s.gbyte_per_s for s in speeds))
    middle = size.context_tokens + size.new_tokens // 2
    floors = {str(batch): size.shape.step_floor_s(best, batch, middle) for batch in size.batches}
    return {"seconds": seconds, "floor_s": floors, "speed": dataclasses.asdict(best), "complaints": complaints}


def describe(found: dict[str, Any], size: Size) -> tuple[tuple[str, str], ...]:
    """The card's sections."""
    scaling, flops = scaling_of(found["prefill"]["seconds"]), size.shape.prefill_flops(size.prompt_tokens)
    copies = " / ".join(f"{copy.median_s:.3g}" for copy in scaling.copies)
    bound_s = flops[0] / (found["prefill"]["gflop_per_s"] * 1e9)
    header = ["one rank", "two copies at once", "split over two", "speed-up", "reachable", "of it", "on paper", "bound"]
    row = [str(scaling.alone), f"{copies} s", str(scaling.split), f"{scaling.speedup:.2f}", f"{scaling.reachable:.2f}"]
    row += [f"{scaling.efficiency:.0%}", f"{flops[0] / max(flops[1:]):.2f}", f"{bound_s:.3g} s"]
    prefill = table(header, [row])
    prefill += (
        f"\n\n{size.prompt_tokens:,} tokens, through `generate` with one new token. Reachable: what two independent "
        "copies reach together. On paper: arithmetic of the prompt against that of the slower rank, whose pieces run "
        "the rule over values widened by the keys. Bound: one rank's arithmetic at the "
        f"{found['prefill']['gflop_per_s']:.0f} GFLOP/s that a product reaches here."
    )
    decode, rows = found["decode"], []
    for batch, by_name in decode["seconds"].items():
        times = {name: Timing(tuple(values)) for name, values in by_name.items()}
        for name, timing in times.items():
            rate = f"{int(batch) / timing.median_s:,.0f}"
            share = f"{decode['floor_s'][batch] / timing.median_s:.0%}"
            ratio = "" if name == OURS else f"{timing.median_s / times[OURS].median_s:.2f}"
            rows.append([batch, name, str(timing), rate, share, ratio])
    steps = table(["sequences", "engine", "a step", "tokens/s", "of the bound", "x ours"], rows)
    steps += (
        f"\n\nBehind {size.context_tokens} tokens. Bound: weights once, states read and written, KV read, at "
        f"{decode['speed']['gflop_per_s']:.0f} GFLOP/s and {decode['speed']['gbyte_per_s']:.1f} GB/s; the rest free."
    )
    return ("Prefill, 1 thread per process", prefill), ("Decode, one process of 1 thread", steps)


def summarize(found: dict[str, Any], size: Size, *, agreed: bool, card: Path | None) -> dict[str, Any]:
    """The last line of stdout. Times are null when answers differ."""
    scaling, flops = scaling_of(found["prefill"]["seconds"]), size.shape.prefill_flops(size.prompt_tokens)
    steps = {
        f"decode_batch_{batch}": {
            **{f"{name}_step_s": Timing(tuple(s)).median_s if agreed else None for name, s in by_name.items()},
            "bound_step_s": found["decode"]["floor_s"][batch],
        }
        for batch, by_name in found["decode"]["seconds"].items()
    }
    return {
        "benchmark": "hybrids",
        "answers_agree": agreed,
        "prefill_tokens": size.prompt_tokens,
        "prefill_alone_s": scaling.alone.median_s if agreed else None,
        "prefill_split_s": scaling.split.median_s if agreed else None,
        "prefill_of_reachable": scaling.efficiency if agreed else None,
        "prefill_speedup_on_paper": flops[0] / max(flops[1:]),
        "prefill_bound_s": flops[0] / (found["prefill"]["gflop_per_s"] * 1e9),
        **steps,
        "card": None if card is None else str(card),
    }


if __name__ == "__main__":
    sys.exit(main())
