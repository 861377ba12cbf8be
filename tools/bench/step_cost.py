"""What a decode step costs beside the model: scheduling, planning, commit, agreement, and choosing tokens.

    python tools/bench/step_cost.py             # seconds; writes a card to tools/bench/results/
    python tools/bench/step_cost.py --quick     # fewer steps, no card

No model runs: sequences of 600 tokens decode through the real scheduler, planner and backend planner, and random logits
are sampled. Figures are microseconds per running sequence and step, medians over steps; the target for all but sampling
is 20. Before anything is timed, the slots planned for a step are compared with those of the sharding rule. A table goes
to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":  # started as a file: the modules beside it are found as they are in tests
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import RESULTS, Card, say, table
from cpinfer.backends.torch_backend import TorchBackend
from cpinfer.comm.axis import SoloComm
from cpinfer.config import SamplingParams
from cpinfer.engine.agreement import agree_on_tokens
from cpinfer.engine.kv_home import KVHome
from cpinfer.engine.request import Prompt, SampledToken
from cpinfer.engine.request import Sequence as Sample
from cpinfer.engine.sampling import sample_tokens
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.stopping import Stopping
from cpinfer.layout.decode import DecodePlan, plan_decode
from cpinfer.layout.shards import KVSharding

TARGET_US = 20.0
PROMPT_LEN = 600
VOCAB_SIZE = 32768
STAGES = ("schedule", "plan", "backend plan", "agree", "commit")
CPU = torch.device("cpu")
# What sampling is timed with, by the name in the table.
CHOICES = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(temperature=1),
    "top-k 50": SamplingParams(temperature=1, top_k=50),
    "top-p 0.95": SamplingParams(temperature=1, top_p=0.95),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and no card")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the card goes")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    num_steps = 5 if args.quick else 60
    steps = {(n, s): step_us(n, s, num_steps) for n in (64, 256) for s in (1, 2)}
    choices = {name: sampling_us(params, 64, num_steps) for name, params in CHOICES.items()}

    step_table = table(
        ["sequences", "KV shards", *STAGES, "all", f"of {TARGET_US:g} us"],
        [
            [str(n), str(s), *(f"{us[k]:.2f}" for k in STAGES), f"{sum(us.values()):.1f}", share(us)]
            for (n, s), us in steps.items()
        ],
    )
    choice_table = table(["sampling", "us per sequence"], [[name, f"{us:.0f}"] for name, us in choices.items()])
    say(f"{step_table}\n\n{choice_table}")
    if not args.quick:
        card = Card(
            theme="step_cost",
            title="What a decode step costs beside the model",
            command="python tools/bench/step_cost.py",
            sections=(
                ("Scheduling, planning, commit: microseconds per running sequence and step", step_table),
                (f"Choosing tokens: 64 rows of {VOCAB_SIZE:,} logits, one thread", choice_table),
            ),
            resolved={"num_steps": num_steps, "prompt_len": PROMPT_LEN, **{k: asdict(v) for k, v in CHOICES.items()}},
        )
        say(f"card: {card.write(args.results)}")
    worst = max(sum(us.values()) for us in steps.values())
    print(json.dumps({"worst_step_us_per_sequence": worst, "target_us": TARGET_US, "sampling_us": choices}))
    return 0 if worst <= TARGET_US else 1


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
        scheduler.add(Sample(Prompt(i, str(i), tuple(range(i, i + PROMPT_LEN))), 0, params, 200))
    sampled = [SampledToken(1, -1.0, -1.0)] * num_sequences
    first = scheduler.schedule()
    assert first is not None
    scheduler.commit(first, sampled, lambda sequence: False)

    backend, replica = TorchBackend(CPU), SoloComm()
    places = [(0, i) for i in range(num_sequences)]
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[stage].append(time.perf_counter() - start)
        return result

    for i in range(num_steps):
        step = timed("schedule", scheduler.schedule)
        plan = timed("plan", partial(plan_of, step.running, sharding))
        if i == 0:
            check(plan, step.running, sharding)
        timed("backend plan", partial(backend.plan, plan.rows))
        tokens = timed("agree", partial(agree_on_tokens, replica, 1, places, sampled, CPU))
        timed("commit", partial(scheduler.commit, step, tokens, lambda sequence: False))
    return {stage: statistics.median(found) / num_sequences * 1e6 for stage, found in seconds.items()}


def plan_of(running: Sequence[Sample], sharding: KVSharding) -> DecodePlan:
    positions, tables = [s.next_position for s in running], [s.blocks for s in running]
    return plan_decode(positions, tables, sharding, pcp_size=sharding.num_shards, pcp_rank=0, shard=0)


def check(plan: DecodePlan, running: Sequence[Sample], sharding: KVSharding) -> None:
    """The slots that a plan writes to are those of the rule, or AssertionError."""
    wanted = [
        sharding.slots(np.asarray(s.blocks), np.array([s.next_position]), 0)[0]
        for s in (running[i] for i in plan.gathered)
    ]
    assert plan.write_slots.tolist() == [slot for slot in wanted if slot >= 0], "planned slots are wrong"


def sampling_us(params: SamplingParams, num_rows: int, num_steps: int) -> float:
    """Median microseconds per row of choosing tokens."""
    logits = 3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows = [Sample(Prompt(i, str(i), (1,)), 0, params, 10) for i in range(num_rows)]
    stopping = Stopping((), None)
    chosen = sample_tokens(logits, rows, stopping)
    if params.greedy:
        assert [token.token_id for token in chosen] == logits.argmax(dim=-1).tolist(), "greedy is not the argmax"
    seconds = []
    for _ in range(max(3, num_steps // 10)):
        start = time.perf_counter()
        sample_tokens(logits, rows, stopping)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / num_rows * 1e6


if __name__ == "__main__":
    sys.exit(main())
