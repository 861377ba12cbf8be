"""What it costs that ranks compare a call before it runs: one gather of digests, on two processes over gloo.

    python tools/bench/same_call.py             # a minute; writes a card to tools/bench/results/
    python tools/bench/same_call.py --quick     # fewer rounds, no card

Timed is the comparison that `generate` makes, over prompts of several numbers and lengths, beside a bare gather of the
same four numbers (what no comparison can be cheaper than) and beside the whole call with 16 new tokens; then the
weights of the model, by samples and by a checksum of every element. Before anything is timed, a call that differs in
one token of one prompt must be refused, on both ranks. A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpinfer_tools.measuring.harness import ROOT, bench_parser, read_task, run_workers, say, table, write_card

MODEL = ROOT / "configs" / "recall-tiny"
NEW_TOKENS = 16
# (prompts, tokens of each) of a call.
CALLS = ((1, 2_000), (64, 500), (512, 50))


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--worker"]:
        return work(read_task(given[1]))
    args = bench_parser(__doc__, budget_s=60).parse_args(given)
    task = {"rounds": 3 if args.quick else 30, "calls": CALLS[:1] if args.quick else CALLS}
    outcome = run_workers(Path(__file__).resolve(), 2, task, timeout_s=600)
    sections = describe(outcome)
    for _, body in sections:
        say(body)
    card = write_card("same_call", "What it costs to compare calls", sections, task, args, given)
    print(json.dumps({"benchmark": "same_call", **outcome, "card": None if card is None else str(card)}))
    return 0


def describe(outcome: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The card's sections."""
    bound = outcome["gather_us"]
    rows = [
        [
            f"{call['prompts']} x {call['tokens']:,}",
            f"{call['compare_us']:,.0f}",
            f"{bound:,.0f}",
            f"{call['generate_us'] / 1000:,.0f} ms",
            f"{call['compare_us'] / call['generate_us']:.2%}",
        ]
        for call in outcome["calls"]
    ]
    header = ["prompts x tokens", "comparison, us", "bare gather, us", f"call of {NEW_TOKENS} new tokens", "share"]
    weights = table(
        ["weights compared by", "ms, when an engine attaches"],
        [["samples", f"{outcome['samples_ms']:.2f}"], ["every element", f"{outcome['full_ms']:.2f}"]],
    )
    weights += f"\n\n{outcome['num_tensors']} tensors, {outcome['num_elements']:,} elements, float32."
    return (("Before a call, medians", table(header, rows)), ("Weights, medians", weights))


def work(task: dict[str, Any]) -> int:
    """One rank of the two; the first writes what was measured."""
    import torch
    from transformers import AutoModelForCausalLM

    import cpinfer
    from cpinfer.comm.bootstrap import Launch, default_group
    from cpinfer.config import EngineConfig, SamplingParams
    from cpinfer.engine.agreement import Prepared, begin_together
    from cpinfer.engine.request import Prompt
    from cpinfer.layout.grid import RankGrid
    from cpinfer.models.weight_samples import weight_identity

    launch = Launch.from_environ(os.environ)
    rounds, cpu = task["rounds"], torch.device("cpu")
    with default_group(launch):
        topology = cpinfer.Topology.from_world(RankGrid(pcp_size=2, dcp_size=2))
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)
        config = EngineConfig(dtype="float32", kv_cache_gib=0.1)
        sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        numbers = torch.zeros(4, dtype=torch.int64)
        found: dict[str, Any] = {"calls": []}
        with cpinfer.attach(model, topology, config) as engine:
            exchanging = engine.topology
            found["gather_us"] = median_us(lambda: exchanging.replica.all_gather(numbers), rounds)
            for num_prompts, num_tokens in task["calls"]:
                prompts = [tuple((7 * i + j) % 200 for j in range(num_tokens)) for i in range(num_prompts)]
                asked = [Prompt(i, str(i), tokens) for i, tokens in enumerate(prompts)]
                refused_when_different(engine, prompts, sampling, launch.rank)

                def compare(asked: list[Prompt] = asked) -> None:
                    same = {"call": "generate", "sampling": sampling, "prompts": asked}
                    begin_together(exchanging, cpu, lambda: Prepared(None, lambda: same))

                whole = median_us(lambda prompts=prompts: engine.generate(prompts, sampling), min(rounds, 3))  # type: ignore[misc]
                found["calls"].append(
                    {
                        "prompts": num_prompts,
                        "tokens": num_tokens,
                        "compare_us": median_us(compare, rounds),
                        "generate_us": whole,
                    }
                )
        tensors = [*model.parameters(), *model.buffers()]
        found["num_tensors"], found["num_elements"] = len(tensors), sum(x.numel() for x in tensors)
        found["samples_ms"] = median_us(lambda: weight_identity(model), rounds) / 1000
        found["full_ms"] = median_us(lambda: weight_identity(model, full=True), rounds) / 1000
        topology.close()
    if launch.rank == 0:
        Path(task["output"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def refused_when_different(engine: Any, prompts: list[tuple[int, ...]], sampling: Any, rank: int) -> None:
    """A token that differs on one rank must be seen, or AssertionError: else what is timed compares nothing."""
    from cpinfer.errors import RanksDifferError

    other = [*prompts[:-1], (*prompts[-1][:-1], prompts[-1][-1] + rank)]
    try:
        engine.generate(other, sampling)
    except RanksDifferError:
        return
    raise AssertionError("ranks that brought different prompts were not refused")


def median_us(call: Callable[[], Any], rounds: int) -> float:
    """Microseconds of a call, the median of `rounds` after one that does not count."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


if __name__ == "__main__":
    sys.exit(main())
