"""The model of cost beside the clock: predicted and measured seconds of prefill and decode, layout by layout.

    python tools/bench/plan.py               # minutes; writes a card to tools/bench/results/
    python tools/bench/plan.py --quick       # seconds; tiny, no card: only shows that it works

One, two and four ranks of one thread each, a random Qwen2-like model in float32, all layouts of so many ranks. Rates
are measured before, by small measurements on the same ranks (products of a layer, the attention kernel, a sum over
memory, collectives of nothing and of megabytes, decode steps of toy models); nothing is fitted to the steps that are
predicted. Four ranks share two cores where there are no more: their rates are then those of half a core.

Before any time is told, every layout's tokens are compared with one rank's. Told are the median of all errors and of
each kind of step, and how many pairs of layouts are in the measured order. Times are the least of --rounds, on the
slowest rank: what is above is other programs. Exit 1 when tokens differ.

A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpinfer.layout.advice import legal_layouts
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.cost_model import Link, Rates, StepSeconds, decode_step, prefill
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.step_traffic import ModelSizes, Widths
from cpinfer_tools.measuring.harness import bench_parser, run_bench, run_workers, say, table, write_card
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, ModelShape, random_prompts, shape_as_dict

if TYPE_CHECKING:
    from talk import Talk

WORLDS = (1, 2, 4)
TARGET = 0.15
BLOCK_SIZE = 16
FLOAT32 = Widths(4, 4, 4)
PARTS = ("products", "attention", "links", "host")


@dataclass(frozen=True)
class Size:
    """How large the measured work is: a prompt to prefill, and (sequences, tokens of each) to decode behind."""

    shape: ModelShape
    prompt_tokens: int
    decodes: tuple[tuple[int, int], ...]

    @property
    def model(self) -> ModelSizes:
        """What the model of cost wants to know."""
        shape = self.shape
        return ModelSizes(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            kv_head=KVLayout(1, shape.head_dim, shape.head_dim),
            layer_params=shape.params_per_token,
            windows=(None,) * shape.num_layers,
        )


FULL = Size(ModelShape(), prompt_tokens=2048, decodes=((16, 128), (4, 2048)))
QUICK = Size(QUICK_SHAPE, prompt_tokens=256, decodes=((4, 32), (1, 256)))


@dataclass(frozen=True)
class Compared:
    """A step of a layout: what was predicted and what it took."""

    grid: RankGrid
    step: str
    predicted: StepSeconds
    measured_s: float

    @property
    def error(self) -> float:
        """Of the predicted seconds, as a share of the measured; above 0 it was quicker than predicted."""
        return self.predicted.seconds / self.measured_s - 1


def grids(num_ranks: int, shape: ModelShape) -> list[RankGrid]:
    """Every layout of so many ranks."""
    return [option.grid for option in legal_layouts(num_ranks, shape.num_q_heads, shape.num_kv_heads)]


def steps_of(size: Size) -> list[str]:
    """The names of what is measured of each layout."""
    return ["prefill", *(f"decode {batch} x {context}" for batch, context in size.decodes)]


def predictions(size: Size, grid: RankGrid, rates: Rates) -> dict[str, StepSeconds]:
    """By name; every replica has a prompt, and its share of the sequences."""
    found = {"prefill": prefill(size.model, grid, rates, [size.prompt_tokens], size.prompt_tokens, FLOAT32)}
    for name, (batch, context) in zip(steps_of(size)[1:], size.decodes, strict=True):
        found[name] = decode_step(size.model, grid, rates, [context + 8] * -(-batch // grid.dp_size), FLOAT32)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("plan", parse_args(argv), argv, bench, work)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(__doc__, budget_s=600)
    parser.add_argument("--ranks", type=int, nargs="+", choices=WORLDS, default=list(WORLDS), help="default: 1 2 4")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the workers, compare, then tell: table, card, summary."""
    size = QUICK if args.quick else FULL
    outcomes = {}
    for num_ranks in args.ranks:
        task = {"quick": args.quick, "rounds": 1 if args.quick else args.rounds, "num_ranks": num_ranks}
        outcomes[num_ranks] = run_workers(Path(__file__).resolve(), num_ranks, task, timeout_s=300 + args.budget_s)
    complaints = complaints_of(outcomes)
    compared = [each for outcome in outcomes.values() for each in compare(size, outcome)]
    card = None
    if complaints:
        say("plan: no times, the answers differ:\n" + "\n".join(complaints))
    else:
        sections = describe(compared, outcomes)
        say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
        resolved = {"model": shape_as_dict(size.shape), "prompt_tokens": size.prompt_tokens, "decodes": size.decodes}
        resolved |= {"rounds": args.rounds, "threads_per_process": 1, "dtype": "float32", "block_size": BLOCK_SIZE}
        card = write_card("plan", "The model of cost beside the clock", sections, resolved, args, argv)
    print(json.dumps(summarize(compared, complaints, card)), flush=True)
    return 1 if complaints else 0


def complaints_of(outcomes: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A sentence for each layout whose tokens are not those of the first of all."""
    found = [(grid, layout["tokens"]) for outcome in outcomes.values() for grid, layout in outcome["layouts"]]
    (_, wanted), *others = found
    return [f"{RankGrid(*grid)} gave other tokens" for grid, tokens in others if tokens != wanted]


def compare(size: Size, outcome: Mapping[str, Any]) -> list[Compared]:
    """Of the layouts of one number of ranks."""
    rates = rates_of(outcome["rates"])
    return [
        Compared(RankGrid(*sizes), step, predicted, layout["seconds"][step])
        for sizes, layout in outcome["layouts"]
        for step, predicted in predictions(size, RankGrid(*sizes), rates).items()
    ]


def rates_of(plain: Mapping[str, Any]) -> Rates:
    """Rates, of what JSON made of them."""
    points = tuple((rows, flops) for rows, flops in plain["product_flops"])
    return Rates(**{**plain, "product_flops": points, "link": Link(**plain["link"])})


def median_error(compared: Sequence[Compared]) -> float:
    """The median of the errors' sizes."""
    return statistics.median(abs(each.error) for each in compared)


def pairs_in_order(compared: Sequence[Compared]) -> float:
    """Of all pairs of layouts with the same work and number of ranks, how many are predicted in the measured order.

    Pairs that were measured within 5 % of each other have no order.
    """
    right = total = 0
    for i, a in enumerate(compared):
        for b in compared[:i]:
            is_same = a.step == b.step and a.grid.world_size == b.grid.world_size and a.grid.dp_size == b.grid.dp_size
            if is_same and not 0.95 < a.measured_s / b.measured_s < 1.05:
                total += 1
                right += (a.measured_s < b.measured_s) == (a.predicted.seconds < b.predicted.seconds)
    return right / total if total else 1.0


def describe(compared: Sequence[Compared], outcomes: Mapping[int, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The card's sections."""
    rows = [
        [
            f"tp={each.grid.tp_size} pcp={each.grid.pcp_size} dcp={each.grid.dcp_size} dp={each.grid.dp_size}",
            each.step,
            f"{each.predicted.seconds * 1e3:.2f}",
            f"{each.measured_s * 1e3:.2f}",
            f"{each.error:+.0%}",
            *(f"{getattr(each.predicted, part) / each.predicted.seconds:.0%}" for part in PARTS),
        ]
        for each in compared
    ]
    header = ["layout", "step", "predicted ms", "measured ms", "error", *PARTS]
    by_step = {
        step: median_error([each for each in compared if each.step == step])
        for step in dict.fromkeys(each.step for each in compared)
    }
    by_ranks = {n: median_error([each for each in compared if each.grid.world_size == n]) for n in outcomes}
    num_layouts = len({each.grid for each in compared})
    told = (
        f"{num_layouts} layouts, {len(compared)} steps: the median error is **{median_error(compared):.0%}** "
        f"(goal: at most {TARGET:.0%}); {_by(by_step)}; {_by({f'{n} ranks': error for n, error in by_ranks.items()})}. "
        f"Of pairs of layouts of as many ranks and replicas, {pairs_in_order(compared):.0%} are in the measured order "
        "(those within 5 % of each other have none)."
    )
    rates = "\n".join(f"- {n} rank(s): {told_rates(outcome)}" for n, outcome in outcomes.items())
    return [("Predicted and measured", f"{table(header, rows)}\n\n{told}"), ("Rates, measured before", rates)]


def _by(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.0%}" for name, error in errors.items())


def told_rates(outcome: Mapping[str, Any]) -> str:
    """Rates in words."""
    rates = rates_of(outcome["rates"])
    products = ", ".join(f"{flops / 1e9:.0f} at {rows}" for rows, flops in rates.product_flops)
    of_host = {
        "step": rates.step_s,
        "layer": rates.layer_s,
        "sequence": rates.row_s,
        "decode exchange": rates.exchange_s,
    }
    host = ", ".join(f"a {name} {seconds * 1e6:.0f} us" for name, seconds in of_host.items())
    return (
        f"products {products} rows, prefill attention {rates.attention_flops / 1e9:.0f}, decode attention "
        f"{(rates.decode_flops or 0) / 1e9:.0f} GFLOP/s; memory {rates.memory_bandwidth / 1e9:.1f} GB/s; links "
        f"{rates.link.bandwidth / 1e9:.2f} GB/s, {rates.link.latency_s * 1e6:.0f} us; of the host {host}; load of the "
        f"machine {outcome['load'][0]:.1f}, then {outcome['load'][1]:.1f}"
    )


def summarize(compared: Sequence[Compared], complaints: Sequence[str], card: Path | None) -> dict[str, Any]:
    """The last line of stdout."""
    summary: dict[str, Any] = {"benchmark": "plan", "ok": not complaints, "card": None if card is None else str(card)}
    if not complaints:
        summary |= {"num_layouts": len({each.grid for each in compared}), "num_steps": len(compared)}
        summary |= {"median_error": median_error(compared), "target": TARGET, "in_order": pairs_in_order(compared)}
    return summary


def work(task: Mapping[str, Any]) -> int:
    """One rank: rates, then every layout; rank 0 writes what came of them."""
    import torch
    import transformers

    import cpinfer
    from cpinfer.comm.bootstrap import Launch, default_group
    from cpinfer.config import EngineConfig
    from cpinfer.engine.collectives import collectives_in_shared_memory
    from cpinfer_tools.measuring.rates import measured_rates
    from talk import Talk

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    launch, size = Launch.from_environ(os.environ), QUICK if task["quick"] else FULL
    load = os.getloadavg()[0]
    with default_group(launch):
        talk = Talk(launch.rank, launch.world_size)
        all_ranks = cpinfer.Topology.from_world(RankGrid(pcp_size=launch.world_size))
        with collectives_in_shared_memory(all_ranks, EngineConfig()) as exchanging:  # as engines do
            rates = measured_rates(size.shape, exchanging.pcp, talk.all, quick=task["quick"])
        all_ranks.close()
        layouts = []
        for grid in grids(launch.world_size, size.shape):
            layouts.append((dataclasses.astuple(grid), measure(task, size, grid, talk)))
            if launch.rank == 0:
                say(f"plan: {grid}: {layouts[-1][1]['seconds']}")
    if launch.rank == 0:
        outcome = {"rates": dataclasses.asdict(rates), "layouts": layouts, "load": [load, os.getloadavg()[0]]}
        Path(task["output"]).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def measure(task: Mapping[str, Any], size: Size, grid: RankGrid, talk: Talk) -> dict[str, Any]:
    """The least seconds of each kind of step of a layout, of the slowest rank, and the first tokens it gave."""
    import torch

    import cpinfer
    from cpinfer.config import EngineConfig, SamplingParams
    from cpinfer_tools.measuring.rates import decode_step_s
    from cpinfer_tools.measuring.workloads import make_model

    model = make_model(size.shape)
    if grid.tp_size > 1:
        from cpinfer_integrations.deepspeed import launch_inference

        launched = launch_inference(model, grid, dtype=torch.float32)
        model, topology = launched.module, launched.topology
    else:
        topology = cpinfer.Topology.from_world(grid)
    tokens = max(size.prompt_tokens, *(batch * (context + 64) for batch, context in size.decodes))
    config = EngineConfig(
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_gib=2 * tokens * size.shape.kv_bytes_per_token / 2**30,
        max_num_batched_tokens=2**17,
        cascade_attention="off",
    )
    seconds: dict[str, float] = {}
    with cpinfer.attach(model, topology, config) as engine:

        def prefill_s(seed: int) -> float:
            [prompt] = random_prompts([size.prompt_tokens], size.shape.vocab_size, seed)
            talk.barrier()
            start_s = time.perf_counter()
            engine.generate([list(prompt)], SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True))
            return time.perf_counter() - start_s

        first = [prefill_s(seed) for seed in range(task["rounds"] + 1)][1:]
        seconds["prefill"] = max(talk.all(min(first)))
        for name, (batch, context) in zip(steps_of(size)[1:], size.decodes, strict=True):
            prompts = random_prompts([context] * -(-batch // grid.dp_size), size.shape.vocab_size, 100)
            mine = decode_step_s(engine, [list(p) for p in prompts], task["rounds"])
            seconds[name] = max(talk.all(mine))
        [prompt] = random_prompts([64], size.shape.vocab_size, 200)
        [result] = engine.generate([list(prompt)], SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True))
    topology.close()
    return {"seconds": seconds, "tokens": list(result.token_ids)}


if __name__ == "__main__":
    sys.exit(main())
