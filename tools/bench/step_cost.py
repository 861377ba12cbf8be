"""What a step costs beside the model: scheduling, planning, commit, agreement, choosing tokens, and admission.

    python tools/bench/step_cost.py             # a minute; writes a card to tools/bench/results/
    python tools/bench/step_cost.py --quick     # fewer steps, no card, no target

In the first three parts no model runs. Sequences of about 600 tokens, which begin their blocks in turn, decode through
the real scheduler, planner and backend planner, and random logits are sampled. Figures are microseconds per running
sequence and step, medians over steps; the target for all but sampling is 3. Short prompts are admitted all in one step,
more and more of them; each is to cost the same. Last, the engine decodes with a model of two layers, and the
scheduler's part of the step is taken; the target is a tenth. And phases of six tokens by that model stand beside
Transformers' `generate`. Times are those of the thread on its processor, so other programs on the machine do not count.

Before anything is timed, the slots planned for a step are compared with those of the sharding rule, and a phase's
tokens with those of `generate`. A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.registry import make_backend
from cpinfer.comm.axis import SoloComm
from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.engine.agreement import agree_on_tokens
from cpinfer.engine.request import Prompt, Request, SampledRequest, SampledToken
from cpinfer.engine.sampling import sample_tokens
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step import Step
from cpinfer.engine.step_plans import StepPlanner
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.engine.token_records import TokenRecords
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.decode import DecodePlan
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.shards import KVSharding
from cpinfer.ops import draws
from cpinfer_tools.measuring.harness import RESULTS, ROOT, Card, say, table

MODEL = ROOT / "configs" / "recall-tiny"
TARGET_US = 3.0
# One alone has what a step costs whatever its size; the target is for the others.
SEQUENCES = (1, 64, 512, 2048)
TARGET_SHARE = 0.1
PROMPT_LEN = 600
VOCAB_SIZE = 151_936  # Qwen's
STAGES = ("schedule", "plan", "backend plan", "agree", "commit")
ADMISSION_STAGES = ("add", "schedule", "commit")
CPU = torch.device("cpu")
ADMITTED = (256, 1024, 4096)
ADMITTED_LEN = 8
# Sequences that a model decodes together.
RUNNING = 1024
# A phase so short that what surrounds the model decides: prompts of so many tokens, answers of so many.
PHASE_SEQUENCES, PHASE_PROMPT, PHASE_NEW = (1, 16, 64), 12, 6
PHASES = ("generate", "phase", "engine")
# What sampling is timed with, by the name in the table.
CHOICES = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(temperature=1),
    "top-k 50": SamplingParams(temperature=1, top_k=50),
    "top-p 0.95": SamplingParams(temperature=1, top_p=0.95),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, no card, and no target")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the card goes")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    num_steps = 5 if args.quick else 60
    steps = {(n, s): step_us(n, s, num_steps) for n in SEQUENCES for s in (1, 2)}
    choices = {name: sampling_us(params, 64, num_steps) for name, params in CHOICES.items()}
    with mock.patch.object(draws, "functions_of", lambda *given, **named: None):
        by_torch = {name: sampling_us(params, 64, num_steps) for name, params in CHOICES.items()}
    admitted = {n: admission_us(n, 3 if args.quick else 9) for n in (ADMITTED[:2] if args.quick else ADMITTED)}
    decoded = decode_share(64 if args.quick else RUNNING, 8 if args.quick else 24)
    phases = {n: phase_ms(n, 3 if args.quick else 15) for n in PHASE_SEQUENCES}

    sections = (
        ("Scheduling, planning, commit: microseconds per running sequence and step", step_table(steps)),
        (f"Choosing tokens: 64 rows of {VOCAB_SIZE:,} logits, one thread", choice_table(choices, by_torch)),
        (
            f"Admission: prompts of {ADMITTED_LEN} tokens, all in one step; microseconds per prompt",
            admission_table(admitted),
        ),
        (f"The scheduler's part of a decode step of {MODEL.name}, one thread; milliseconds", share_table(decoded)),
        (
            f"Phases of {MODEL.name}: prompts of {PHASE_PROMPT} tokens, answers of {PHASE_NEW}, sampled; milliseconds",
            phase_table(phases),
        ),
    )
    say("\n\n".join(body for _, body in sections))
    if not args.quick:
        card = Card(
            theme="step_cost",
            title="What a step costs beside the model",
            command="python tools/bench/step_cost.py",
            sections=sections,
            resolved={
                "clock": "the thread's time on its processor; medians",
                "num_steps": num_steps,
                "prompt_len": PROMPT_LEN,
                **{k: asdict(v) for k, v in CHOICES.items()},
            },
        )
        say(f"card: {card.write(args.results)}")
    worst = max(sum(us.values()) for (n, _), us in steps.items() if n > 1)
    figures = {"worst_step_us_per_sequence": worst, "target_us": TARGET_US, "sampling_us": choices}
    print(
        json.dumps(
            {
                **figures,
                "sampling_by_torch_us": by_torch,
                "admission_us": admitted,
                "decode": decoded,
                "target_share": TARGET_SHARE,
                "phase_ms": phases,
            }
        )
    )
    return 0 if args.quick or (worst <= TARGET_US and decoded["share"] <= TARGET_SHARE) else 1


def step_table(steps: dict[tuple[int, int], dict[str, float]]) -> str:
    return table(
        ["sequences", "KV shards", *STAGES, "all", f"of {TARGET_US:g} us"],
        [
            [str(n), str(s), *(f"{us[k]:.2f}" for k in STAGES), f"{sum(us.values()):.1f}", share(us)]
            for (n, s), us in steps.items()
        ],
    )


def choice_table(choices: dict[str, float], by_torch: dict[str, float]) -> str:
    header = ["sampling", "us per sequence", "without a compiler"]
    return table(header, [[name, f"{us:.0f}", f"{by_torch[name]:.0f}"] for name, us in choices.items()])


def admission_table(admitted: dict[int, dict[str, float]]) -> str:
    return table(
        ["prompts", *ADMISSION_STAGES, "all", "together"],
        [
            [
                f"{n:,}",
                *(f"{us[k]:.1f}" for k in ADMISSION_STAGES),
                f"{sum(us.values()):.1f}",
                f"{sum(us.values()) * n / 1e3:.0f} ms",
            ]
            for n, us in admitted.items()
        ],
    )


def share_table(decoded: dict[str, float]) -> str:
    header = ["sequences", "step", "schedule and commit", "share", "target"]
    row = [f"{decoded['sequences']:,.0f}", f"{decoded['step_ms']:.1f}", f"{decoded['scheduler_ms']:.2f}"]
    return table(header, [[*row, f"{decoded['share']:.1%}", f"{TARGET_SHARE:.0%}"]])


def phase_table(phases: dict[int, dict[str, float]]) -> str:
    header = ["sequences", "generate", "attach, answer, detach", "answer, weights new", "generate over it"]
    return table(
        header,
        [
            [str(n), *(f"{ms[k]:.1f}" for k in PHASES), f"{ms['generate'] / ms['engine']:.2f}"]
            for n, ms in phases.items()
        ],
    )


def share(us: dict[str, float]) -> str:
    """A step's share of the target."""
    return f"{sum(us.values()) / TARGET_US:.0%}"


def step_us(num_sequences: int, num_shards: int, num_steps: int) -> dict[str, float]:
    """Median microseconds per sequence of each stage."""
    sharding = KVSharding(num_shards, 16, 16)
    home = KVHome(num_sequences * 60, sharding, enable_prefix_caching=True)
    scheduler = Scheduler([home], sharding, num_sequences, num_sequences * PROMPT_LEN)
    params = SamplingParams(max_new_tokens=200)
    for i in range(num_sequences):
        length = PROMPT_LEN - i % sharding.block_size
        scheduler.add(SampledRequest(Prompt(i, str(i), tuple(range(i, i + length))), 0, params, 200))
    sampled = [SampledToken(1, -1.0, -1.0)] * num_sequences
    first = scheduler.schedule()
    assert first is not None
    scheduler.commit(first, sampled, lambda sequence: False)

    planner = planner_of(sharding)
    backend, replica = make_backend("auto", CPU, AttentionNeeds(torch.float32, ())), SoloComm()
    places = np.stack((np.zeros(num_sequences, dtype=np.int64), np.arange(num_sequences)), axis=1)
    records = TokenRecords.of(torch.ones(num_sequences, dtype=torch.int64), torch.full((num_sequences,), -1.0))
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = call()
        seconds[stage].append(time.thread_time() - start)
        return result

    for i in range(num_steps):
        step = timed("schedule", scheduler.schedule)
        planned = timed("plan", partial(planner.decode, step.running))
        if i < 2:  # the first is planned anew, the others go on
            check(planned.plan, step.running, sharding)
        timed("backend plan", partial(backend.plan, planned.rows[None]))
        tokens, _ = timed("agree", partial(agree_on_tokens, replica, 1, places, records))
        timed("commit", partial(scheduler.commit, step, tokens, lambda sequence: False))
    return {stage: statistics.median(found) / num_sequences * 1e6 for stage, found in seconds.items()}


def planner_of(sharding: KVSharding) -> StepPlanner:
    """Of the first rank of as many as there are shards."""
    grid = RankGrid(pcp_size=sharding.num_shards, dcp_size=sharding.num_shards)
    return StepPlanner(
        grid,
        0,
        sharding,
        shard=0,
        row_ranks=grid.row_ranks,
        in_buckets=False,
        windows=(None,),
        pairs_per_token=1,
        kv_layout=KVLayout(1, 64, 64),
    )


def check(plan: DecodePlan, running: Sequence[SampledRequest], sharding: KVSharding) -> None:
    """The slots that a plan writes to are those of the rule, or AssertionError."""
    wanted = [
        sharding.slots(np.asarray(s.blocks), np.array([s.next_position]), 0)[0]
        for s in (running[i] for i in plan.gathered)
    ]
    assert plan.write_slots.tolist() == [slot for slot in wanted if slot >= 0], "planned slots are wrong"


def admission_us(num_sequences: int, num_rounds: int) -> dict[str, float]:
    """Median microseconds per prompt of each stage in which short prompts are admitted, all in one step.

    The collector is off while they are timed: it walks what others hold, this process's torch above all.
    """
    sharding = KVSharding(1, 16, 16)
    seconds: dict[str, list[float]] = {stage: [] for stage in ADMISSION_STAGES}
    params = SamplingParams(max_new_tokens=40)
    prompts = [Prompt(i, str(i), tuple(range(i, i + ADMITTED_LEN))) for i in range(num_sequences)]
    for _ in range(num_rounds):
        home = KVHome(num_sequences * 8, sharding, enable_prefix_caching=True)
        scheduler = Scheduler([home], sharding, num_sequences, num_sequences * ADMITTED_LEN)
        samples = [SampledRequest(prompt, 0, params, 40) for prompt in prompts]
        sampled = [SampledToken(1, -1.0, -1.0)] * num_sequences
        gc.collect()
        gc.disable()
        times = [time.thread_time()]
        for sample in samples:
            scheduler.add(sample)
        times.append(time.thread_time())
        step = scheduler.schedule()
        times.append(time.thread_time())
        assert step is not None and len(step.chunks) == num_sequences, "all are admitted at once"
        scheduler.commit(step, sampled, lambda sequence: False)
        times.append(time.thread_time())
        gc.enable()
        for stage, (start, end) in zip(ADMISSION_STAGES, pairwise(times), strict=True):
            seconds[stage].append(end - start)
    return {stage: statistics.median(found) / num_sequences * 1e6 for stage, found in seconds.items()}


def decode_share(num_sequences: int, num_steps: int) -> dict[str, float]:
    """How much of a decode step of a tiny model the scheduler takes, medians over steps."""
    starts: list[float] = []
    spent: list[float] = []
    schedule, commit = Scheduler.schedule, Scheduler.commit

    def timed_schedule(scheduler: Scheduler) -> Step | None:
        starts.append(time.thread_time())
        step = schedule(scheduler)
        spent.append(time.thread_time() - starts[-1])
        return step

    def timed_commit(scheduler: Scheduler, *args: Any) -> list[Request]:
        start = time.thread_time()
        finished = commit(scheduler, *args)
        spent[-1] += time.thread_time() - start
        return finished

    prompts = [[1 + i % 50, *range(2, 2 + ADMITTED_LEN)] for i in range(num_sequences)]
    config = EngineConfig(
        dtype="float32",
        max_num_seqs=num_sequences,
        max_num_batched_tokens=2 * num_sequences * ADMITTED_LEN,
        kv_cache_gib=0.25,
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=num_steps, ignore_eos=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)
    with (
        cpinfer.attach(model, config=config) as engine,
        mock.patch.object(Scheduler, "schedule", timed_schedule),
        mock.patch.object(Scheduler, "commit", timed_commit),
    ):
        results = engine.generate(prompts, sampling)
    assert all(len(result.token_ids) == num_steps for result in results), "answers have other lengths than they were to"
    # The first step prefills, and behind the last none begins, to end it by.
    steps = [end - start for start, end in pairwise(starts)][1:]
    assert len(steps) == num_steps - 2, "all sequences decode together"
    step_s, scheduler_s = statistics.median(steps), statistics.median(spent[1:-1])
    return {
        "sequences": num_sequences,
        "step_ms": step_s * 1e3,
        "scheduler_ms": scheduler_s * 1e3,
        "share": scheduler_s / step_s,
    }


def phase_ms(num_sequences: int, num_rounds: int) -> dict[str, float]:
    """What a phase of few tokens takes by each of `PHASES`, medians of milliseconds. They take turns."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False).eval()
    plain = copy.deepcopy(model)
    numbers = torch.Generator().manual_seed(num_sequences)
    ids = torch.randint(10, 60, (num_sequences, PHASE_PROMPT), generator=numbers)
    prompts, every = ids.tolist(), torch.ones_like(ids)
    config = EngineConfig(dtype="float32", kv_cache_gib=0.01)
    lengths = {"max_new_tokens": PHASE_NEW, "min_new_tokens": PHASE_NEW}

    def generated(**sampling: Any) -> list[list[int]]:
        with torch.no_grad():
            tokens = plain.generate(ids, attention_mask=every, pad_token_id=0, **lengths, **sampling)
        return [row[PHASE_PROMPT:] for row in tokens.tolist()]

    def phase(engine: cpinfer.Engine, temperature: float = 1.0) -> list[list[int]]:
        params = SamplingParams(temperature=temperature, max_new_tokens=PHASE_NEW, min_new_tokens=PHASE_NEW)
        return [list(result.token_ids) for result in engine.generate(prompts, params)]

    def attached() -> None:
        with cpinfer.attach(model, config=config) as engine:
            phase(engine)

    with cpinfer.attach(model, config=config) as engine:
        assert phase(engine, 0.0) == generated(do_sample=False), "the phase has other tokens than generate"

        def again() -> None:
            engine.weights_changed()
            phase(engine)

        ways: dict[str, Callable[[], Any]] = {"generate": partial(generated, do_sample=True, top_k=0), "engine": again}
        times = alternated(ways, num_rounds)
    return {**times, **alternated({"phase": attached}, num_rounds)}


def alternated(ways: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other within a round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds + 1):
        for name, call in ways.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(taken[1:]) * 1e3 for name, taken in seconds.items()}


def sampling_us(params: SamplingParams, num_rows: int, num_steps: int) -> float:
    """Median microseconds per row of choosing tokens."""
    logits = 3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows = [SampledRequest(Prompt(i, str(i), (1,)), 0, params, 10) for i in range(num_rows)]
    stop_checker = StopChecker((), None)
    chosen = sample_tokens(logits, rows, stop_checker).tokens()
    if params.greedy:
        assert [token and token.token_id for token in chosen] == logits.argmax(dim=-1).tolist(), (
            "greedy is not the argmax"
        )
    seconds = []
    for _ in range(max(3, num_steps // 10)):
        start = time.thread_time()
        sample_tokens(logits, rows, stop_checker)
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds) / num_rows * 1e6


if __name__ == "__main__":
    sys.exit(main())
