"""The long tail of a rollout batch: one sample 16 times longer than the rest, over two ranks.

    python tools/bench/long_tail.py             # minutes; writes a card to tools/bench/results/
    python tools/bench/long_tail.py --quick     # seconds; tiny, no card: only shows that it works

Three ways to use two ranks that hold the same weights: plain data parallelism (each replica has half of the samples,
and one of them waits for the other's long one), pcp=2 dcp=2 (both ranks work on every sample) and pcp=2 with dcp left
open ("auto": the engine chooses 1 or 2 for each batch, by steps that it measures when it attaches, which is not timed).
Three batches of eight: one answer is 16 times as long as the others, one prompt is, or both are.

One thread per process, float32, greedy, the same random model. The ways take turns within a round. Before any time is
printed, every token of every answer must be the whole model's likeliest (one forward over prompt and answer), or within
a near-tie of it, and both ways' answers must be the same in every round. Exit 1 when they are not.

Told for each rank: tokens it computed, the share of the wall time outside steps (it has nothing to do, and waits), and
the share inside collectives (it exchanges, or waits for the other within a step). Ratios are data parallelism's median
over ours: above 1, ours is ahead. Behind that: decode steps of batches of equal sequences, with dcp=1 and dcp=2, for
the contexts from where on shards pay. A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from break_even import decode_steps, describe_steps
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
    QUICK_SHAPE,
    ModelShape,
    Speed,
    Workload,
    make_model,
    measure_speed,
    random_prompts,
    shape_as_dict,
)

if TYPE_CHECKING:
    import torch

    import cpinfer
    from talk import Talk

NUM_RANKS = 2
NUM_SAMPLES = 8
TIMES_LONGER = 16
BLOCK_SIZE = 16
STEP_TOKENS = 2048
OURS, OPEN, PLAIN = "pcp=2 dcp=2", "pcp=2 dcp=auto", "dp=2"
SIZES = {OURS: {"pcp_size": 2, "dcp_size": 2}, OPEN: {"pcp_size": 2, "dcp_size": 2}, PLAIN: {"dp_size": 2}}


@dataclass(frozen=True)
class Size:
    """How large the measured work is: the short samples' prompt and answer, and the contexts of single steps."""

    shape: ModelShape
    prompt_tokens: int
    new_tokens: int
    contexts: tuple[int, ...]


FULL = Size(ModelShape(), prompt_tokens=512, new_tokens=16, contexts=(1024, 4096, 16384, 65536))
QUICK = Size(QUICK_SHAPE, prompt_tokens=24, new_tokens=3, contexts=(64, 256))


@dataclass
class Watch:
    """What one rank did in one run, and into how many shards KV was cut."""

    num_shards: int = 1
    num_tokens: int = 0
    busy_s: float = 0.0
    collective_s: float = 0.0


@contextmanager
def timed_collectives(watch: Watch) -> Iterator[None]:
    """A block in which the time of this process's collectives is taken, by whatever they go."""
    from cpinfer.comm.axis import ProcessGroupComm
    from cpinfer.comm.shared_memory import SharedMemory

    def timed(collective: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*given: Any) -> torch.Tensor:
            start_s = time.perf_counter()
            try:
                return collective(*given)
            finally:
                watch.collective_s += time.perf_counter() - start_s

        return call

    with ExitStack() as stack:
        for comm in (ProcessGroupComm, SharedMemory):
            for name in ("all_gather", "all_to_all", "reduce_scatter", "all_reduce"):
                stack.enter_context(mock.patch.object(comm, name, timed(getattr(comm, name))))
        yield


class Way:
    """One way to use the ranks: an engine that stays attached, and a watch on its steps and collectives.

    `own` are the indices of the samples that this rank's replica generates.
    """

    def __init__(self, name: str, topology: cpinfer.Topology, model: Any, shape: ModelShape) -> None:
        self.name = name
        self.watch = Watch()
        self._topology, self._model, self._shape = topology, model, shape
        grid = topology.grid
        self.own = list(range(topology.coords.dp_rank, NUM_SAMPLES, grid.dp_size))

    def run(self, workload: Workload, talk: Talk) -> tuple[list[list[int]], float, Watch]:
        """The tokens of its own samples, the seconds until both ranks had theirs, and what this rank did."""
        import cpinfer
        from cpinfer.config import JobConfig, SamplingParams

        blocks = workload.kv_blocks(BLOCK_SIZE) + NUM_SAMPLES + 1
        config = JobConfig(
            decode_context_parallel_size="auto" if self.name == OPEN else None,
            dtype="float32",
            block_size=BLOCK_SIZE,
            kv_cache_gib=blocks * BLOCK_SIZE * self._shape.kv_bytes_per_token / 2**30,
            max_num_batched_tokens=STEP_TOKENS,
            enable_prefix_caching=False,  # the same prompts come again in every round
        )
        prompts = [list(workload.prompts[i]) for i in self.own]
        sampling = [
            SamplingParams(temperature=0, max_new_tokens=workload.max_new_tokens[i], ignore_eos=True) for i in self.own
        ]
        with timed_collectives(self.watch), cpinfer.attach(self._model, self._topology, config) as engine:
            self._take_time_of(engine)
            self.watch.num_tokens, self.watch.busy_s, self.watch.collective_s = 0, 0.0, 0.0
            results, taken_s = timed(lambda: engine.generate(prompts, sampling), talk.barrier)
            self.watch.num_shards = engine._core.scheduler.sharding.num_shards
        return [list(result.token_ids) for result in results], taken_s, dataclasses.replace(self.watch)

    def _take_time_of(self, engine: Any) -> None:
        """From outside: the engine has no use for these figures."""
        for steps in (engine._steps, *engine._steps._others.values()):
            self._take_time_of_runner(steps)

    def _take_time_of_runner(self, steps: Any) -> None:
        from cpinfer.attention.steps import DecodeStep

        watch = self.watch
        run, forward = steps.run, steps._forward

        def timed_run(step: Any, says: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return run(step, says)
            finally:
                watch.busy_s += time.perf_counter() - start_s

        def counted_forward(inputs: Any, step: Any, linear: Any) -> Any:
            # Padding of decode steps is computed, too; a rank without tokens computes a dummy, which is none.
            watch.num_tokens += len(inputs.token_ids) if isinstance(step, DecodeStep) else step.num_tokens
            return forward(inputs, step, linear)

        vars(steps).update(run=timed_run, _forward=counted_forward)


def long_tail_workloads(size: Size) -> list[Workload]:
    """Eight samples each, the first 16 times longer: in its answer, in its prompt, in both."""
    prompt, new = size.prompt_tokens, size.new_tokens
    found = []
    for name, prompt_times, new_times in (
        ("long answer", 1, TIMES_LONGER),
        ("long prompt", TIMES_LONGER, 1),
        ("long prompt and answer", TIMES_LONGER, TIMES_LONGER),
    ):
        lens = [prompt * prompt_times, *[prompt] * (NUM_SAMPLES - 1)]
        news = (new * new_times, *[new] * (NUM_SAMPLES - 1))
        found.append(Workload(name, random_prompts(lens, size.shape.vocab_size, 21), news))
    return found


def floor_s(samples: Sequence[tuple[int, int]], shape: ModelShape, speed: Speed, num_ranks: int) -> float:
    """The least time for samples of (prompt, new) tokens whose work `num_ranks` ranks share, each with all weights.

    Prefill is bound by arithmetic; a decode step by arithmetic or bytes, whichever is more. Rows, query-key pairs and
    KV are shared; weights are read by every rank. Communication, sampling and all between kernels are free.
    """
    params = shape.params_per_token + shape.vocab_params
    flops = sum(2.0 * shape.params_per_token * p + shape.flops_per_pair * p * (p + 1) / 2 for p, _ in samples)
    seconds = flops / num_ranks / (speed.gflop_per_s * 1e9)
    for step in range(1, max(new for _, new in samples)):
        contexts = [p + step for p, new in samples if new > step]
        flops = (2.0 * params * len(contexts) + shape.flops_per_pair * sum(contexts)) / num_ranks
        num_bytes = params * FLOAT32_BYTES + shape.kv_bytes_per_token * sum(contexts) / num_ranks
        seconds += max(flops / (speed.gflop_per_s * 1e9), num_bytes / (speed.gbyte_per_s * 1e9))
    return seconds


def floors_s(workload: Workload, shape: ModelShape, speed: Speed) -> dict[str, float]:
    """The bound of each way; under data parallelism that of the slower replica."""
    samples = [(len(p), n) for p, n in workload.samples()]
    shared_s = floor_s(samples, shape, speed, NUM_RANKS)
    return {
        OURS: shared_s,
        OPEN: shared_s,
        PLAIN: max(floor_s(samples[rank::NUM_RANKS], shape, speed, 1) for rank in range(NUM_RANKS)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("long_tail", parse_args(argv), argv, bench, work)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return bench_parser(__doc__, budget_s=300).parse_args(argv)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the workers, then tell: table, card, summary."""
    size = QUICK if args.quick else FULL
    task = {"quick": args.quick, "rounds": 2 if args.quick else args.rounds, "budget_s": args.budget_s}
    outcome = run_workers(Path(__file__).resolve(), NUM_RANKS, task, timeout_s=300 + 2 * args.budget_s)
    workloads = long_tail_workloads(size)
    complaints, card = outcome["complaints"], None
    if complaints:
        say("long_tail: no times, the answers are wrong:\n" + "\n".join(complaints))
    else:
        sections = describe(outcome, workloads)
        say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
        resolved = {"model": shape_as_dict(size.shape), "seed_of_prompts": 21, "block_size": BLOCK_SIZE}
        resolved |= {"prompt_tokens": size.prompt_tokens, "new_tokens": size.new_tokens}
        resolved |= {"num_samples": NUM_SAMPLES, "times_longer": TIMES_LONGER}
        resolved |= {"max_num_batched_tokens": STEP_TOKENS, "rounds": task["rounds"], "budget_s": args.budget_s}
        resolved |= {"threads_per_process": 1, "dtype": "float32"}
        title = "One sample 16 times longer than the rest: pcp=2 beside data parallelism"
        card = write_card("long_tail", title, sections, resolved, args, argv)
    print(json.dumps(summarize(outcome, workloads, card)), flush=True)
    return 1 if complaints else 0


def work(task: Mapping[str, Any]) -> int:
    """One rank: run all rounds; rank 0 checks the answers and writes what came of them."""
    import torch
    import transformers

    import cpinfer
    from cpinfer.comm.bootstrap import Launch, default_group
    from cpinfer.layout.grid import RankGrid
    from talk import Talk

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    launch = Launch.from_environ(os.environ)
    size = QUICK if task["quick"] else FULL
    workloads = long_tail_workloads(size)
    with default_group(launch):
        model = make_model(size.shape)
        topologies = {name: cpinfer.Topology.from_world(RankGrid(**sizes)) for name, sizes in SIZES.items()}
        ways = {name: Way(name, topology, model, size.shape) for name, topology in topologies.items()}
        talk = Talk(launch.rank, launch.world_size)
        outcome = run_rounds(task, workloads, ways, talk, size.shape, model)
        outcome["steps"] = []
        if not outcome["complaints"]:
            outcome["steps"] = decode_steps(model, topologies[OPEN], size.shape, size.contexts, talk)
        for topology in topologies.values():
            topology.close()
    if launch.rank == 0:
        Path(task["output"]).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def run_rounds(
    task: Mapping[str, Any],
    workloads: Sequence[Workload],
    ways: Mapping[str, Way],
    talk: Talk,
    shape: ModelShape,
    model: Any,
) -> dict[str, Any]:
    """Warm up and check, then let both ways take turns; seconds and watches of everything that was timed."""
    complaints: list[str] = []
    answers: dict[tuple[str, str], list[list[int]]] = {}
    for workload in workloads:
        for way in ways.values():
            answers[workload.name, way.name] = gathered(way, way.run(workload, talk)[0], talk)
        if talk.rank == 0:
            for way in ways.values():
                complaints += unlikely(model, workload, way.name, answers[workload.name, way.name])
            say(f"long_tail: {workload.name}: answers checked")
    runs: dict[str, dict[str, list[Any]]] = {w.name: {name: [] for name in ways} for w in workloads}
    speeds = [measure_speed(shape)]
    start_s, rounds, load = time.perf_counter(), 0, os.getloadavg()[0]
    while talk.first(
        not complaints and has_time_for_another(rounds, time.perf_counter() - start_s, task["budget_s"], task["rounds"])
    ):
        for workload in workloads:
            for name in rotated(list(ways), rounds):
                tokens, taken_s, watch = ways[name].run(workload, talk)
                watches = talk.all(dataclasses.asdict(watch))
                if gathered(ways[name], tokens, talk) != answers[workload.name, name]:
                    complaints.append(f"{workload.name}, {name}: round {rounds + 1} gave other tokens than the first")
                runs[workload.name][name].append({"taken_s": taken_s, "watches": watches})
                if talk.rank == 0:
                    say(f"long_tail: round {rounds + 1}, {workload.name}, {name}: {taken_s:.2f} s")
        talk.barrier()
        speeds.append(measure_speed(shape))
        rounds += 1
    # The best of all rounds, of the slower rank: a bound is what the machine can do.
    best = talk.all((max(s.gflop_per_s for s in speeds), max(s.gbyte_per_s for s in speeds)))
    speed = Speed(*(min(each) for each in zip(*best, strict=True)))
    num_same = {
        w.name: sum(all(a == each[0] for a in each) for each in zip(*(answers[w.name, n] for n in ways), strict=True))
        for w in workloads
    }
    return {
        "complaints": complaints,
        "runs": runs,
        "rounds": rounds,
        "num_same_answers": num_same,
        "speed": dataclasses.asdict(speed),
        "load": [load, os.getloadavg()[0]],
        "floors_s": {w.name: floors_s(w, shape, speed) for w in workloads},
    }


def gathered(way: Way, tokens: list[list[int]], talk: Talk) -> list[list[int]]:
    """The answers to all samples, in their order, from the ranks that have them."""
    told = talk.all(dict(zip(way.own, tokens, strict=True)))
    merged = {index: answer for part in told for index, answer in part.items()}
    return [merged[index] for index in range(NUM_SAMPLES)]


def unlikely(model: Any, workload: Workload, way: str, answers: Sequence[list[int]]) -> list[str]:
    """A sentence for each answer with a token that the whole model, in this process, does not find the likeliest."""
    import torch

    complaints = []
    for i, ((prompt, num_new), answer) in enumerate(zip(workload.samples(), answers, strict=True)):
        if len(answer) != num_new:
            complaints.append(f"{workload.name}, {way}: sample {i} has {len(answer)} tokens, {num_new} were wanted")
            continue
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            logits = model(ids, use_cache=False, logits_to_keep=num_new).logits[0]
        given = logits.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)
        behind = float((logits.amax(dim=-1) - given).max())
        if not behind <= NEAR_TIE:
            complaints.append(f"{workload.name}, {way}: a token of sample {i} is {behind:.3g} behind the likeliest")
    return complaints


def describe(outcome: Mapping[str, Any], workloads: Sequence[Workload]) -> list[tuple[str, str]]:
    """The card's sections."""
    rows, verdicts = [], []
    for workload in workloads:
        runs, floors = outcome["runs"][workload.name], outcome["floors_s"][workload.name]
        timings = {name: _timing(each) for name, each in runs.items()}
        for name, each in runs.items():
            shares = [_shares(each, rank) for rank in range(NUM_RANKS)]
            timing = timings[name]
            chosen = sorted({run["watches"][0]["num_shards"] for run in each})
            rows.append(
                [
                    workload.name,
                    f"{name} ({', '.join(map(str, chosen))})" if name == OPEN else name,
                    str(timing),
                    " / ".join(f"{share['num_tokens']:,}" for share in shares),
                    " / ".join(f"{share['idle']:.0%}" for share in shares),
                    " / ".join(f"{share['collective']:.0%}" for share in shares),
                    f"{floors[name]:.2f} s",
                    f"{floors[name] / timing.median_s:.0%}",
                ]
            )
        for name in (OURS, OPEN):
            ratio = timings[PLAIN].median_s / timings[name].median_s
            on_paper = floors[PLAIN] / floors[name]
            told = f"**{ratio:.2f}** times as fast as" if ratio >= 1 else f"**behind**, {ratio:.2f} times as fast as"
            verdicts.append(f"- {workload.name}: {name} is {told} {PLAIN}; the bounds allow {on_paper:.2f}.")
    header = ["batch", "ranks as", "median (min..max)", "tokens computed, rank 0 / 1", "idle", "in collectives"]
    header += ["bound", "of the bound"]
    same = ", ".join(f"{n} of {NUM_SAMPLES} ({name})" for name, n in outcome["num_same_answers"].items())
    speed, load = outcome["speed"], outcome["load"]
    body = f"{table(header, rows)}\n\n" + "\n".join(verdicts) + "\n\n"
    body += (
        "Idle: outside steps, waiting for the other replica. In collectives: exchanging, or waiting for the other rank "
        f"within a step. Bound: arithmetic and bytes alone at {speed['gflop_per_s']:.0f} GFLOP/s and "
        f"{speed['gbyte_per_s']:.1f} GB/s a rank, both measured here; every rank reads all weights in every step, rows "
        f"and KV are shared with pcp=2. Behind {OPEN}: the number of shards it took. Every token is the whole model's "
        f"likeliest, up to near-ties of "
        f"{NEAR_TIE:g} in its logit; the same answers all ways: {same}. Load of the machine when the rounds began and "
        f"ended: {load[0]:.1f}, {load[1]:.1f} (2 are these processes; what is above shared the cores with them)."
    )
    batches = "\n".join(f"- **{w.name}**: {w.described()}" for w in workloads)
    return [
        ("Two ranks of one thread each", body),
        ("From where on shards pay", describe_steps(outcome["steps"])),
        ("Batches", batches),
    ]


def summarize(outcome: Mapping[str, Any], workloads: Sequence[Workload], card: Path | None) -> dict[str, Any]:
    """The last line of stdout."""
    summary: dict[str, Any] = {"benchmark": "long_tail", "ok": not outcome["complaints"], "rounds": outcome["rounds"]}
    for workload in workloads if not outcome["complaints"] else ():
        of_ways = {}
        for name, runs in outcome["runs"][workload.name].items():
            shares = [_shares(runs, rank) for rank in range(NUM_RANKS)]
            of_ways[name] = {
                "wall_s": _timing(runs).as_json(),
                "bound_s": outcome["floors_s"][workload.name][name],
                "num_tokens_per_rank": [share["num_tokens"] for share in shares],
                "idle_share_per_rank": [share["idle"] for share in shares],
                "collective_share_per_rank": [share["collective"] for share in shares],
            }
        plain_s = of_ways[PLAIN]["wall_s"]["median_s"]
        speedups = {name: plain_s / of_ways[name]["wall_s"]["median_s"] for name in (OURS, OPEN)}
        summary[workload.name] = {**of_ways, "speedup": speedups}
    return {**summary, "card": None if card is None else str(card)}


def _timing(runs: Sequence[Mapping[str, Any]]) -> Timing:
    return Timing(tuple(run["taken_s"] for run in runs))


def _shares(runs: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """What a rank did, over all rounds together."""
    wall_s = sum(run["taken_s"] for run in runs)
    watches = [run["watches"][rank] for run in runs]
    return {
        "num_tokens": watches[0]["num_tokens"],
        "idle": 1 - sum(w["busy_s"] for w in watches) / wall_s,
        "collective": sum(w["collective_s"] for w in watches) / wall_s,
    }


if __name__ == "__main__":
    sys.exit(main())
