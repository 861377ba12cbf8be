"""How often a seed draws another text in another layout or company: how many answers differ, and logprobs by how much.

    python tools/bench/same_text.py             # four minutes; writes a card to tools/bench/results/
    python tools/bench/same_text.py --quick     # fewer tokens and prompts, no card

A random model answers the same prompts at temperature 1 as one rank, with prompts in chunks, one sequence at a time,
and over two ranks (threads). Answers are compared with the first ones up to the token that differs. Beside them stands
what the inverse CDF would make of the same: one number in the cumulative distribution, tokens in order of their ids.
Another seed must draw other answers, or nothing is told. A table goes to stderr, the last stdout line is one JSON
object.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams
from cpinfer.engine import sampling
from cpinfer.engine.random_numbers import exponentials
from cpinfer.engine.request import RolloutResult, SampledRequest
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.measuring.harness import bench_parser, say, table, write_card
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, make_model

TWO = RankGrid(pcp_size=2, dcp_size=2)
# What answers are compared with comes first.
WAYS: dict[str, tuple[RankGrid, dict[str, int]]] = {
    "one rank": (RankGrid(), {}),
    "chunks of 64 tokens": (RankGrid(), {"max_num_batched_tokens": 64, "max_num_seqs": 64}),
    "one sequence at a time": (RankGrid(), {"max_num_seqs": 1}),
    "pcp2 dcp2": (TWO, {}),
}


@dataclass(frozen=True)
class Size:
    vocab_size: int
    num_prompts: int
    new_tokens: int
    seeds: dict[str, int]


FULL = Size(32_000, 64, 64, {"float32": 4, "bfloat16": 2})
QUICK = Size(1_000, 8, 16, {"float32": 2, "bfloat16": 1})


@dataclass(frozen=True)
class Compared:
    """Answers of one way beside those of the first. `num_tokens` were drawn behind equal text."""

    num_answers: int = 0
    num_different: int = 0
    num_tokens: int = 0
    max_logprob_difference: float = 0.0

    @property
    def share(self) -> str:
        return f"{self.num_different} of {self.num_answers}"

    def and_also(self, one: RolloutResult, other: RolloutResult) -> Compared:
        pairs = list(zip(one.token_ids, other.token_ids, strict=True))
        end = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        steps = [abs(a - b) for a, b in zip(one.logprobs[:end], other.logprobs[:end], strict=True)]
        return Compared(
            self.num_answers + 1,
            self.num_different + (end < len(pairs)),
            self.num_tokens + min(end + 1, len(pairs)),
            max(self.max_logprob_difference, *steps, 0.0),
        )


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = bench_parser(__doc__, budget_s=240).parse_args(given)
    size = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, Compared]]] = {}
    for dtype, num_seeds in size.seeds.items():
        with mock.patch.object(sampling, "_draw", draw_by_inverse_cdf):
            by_cdf = compare(size, dtype, num_seeds)
        found[dtype] = {"races": compare(size, dtype, num_seeds), "inverse CDF": by_cdf}
    sections = [(f"{dtype}, temperature 1", describe(of)) for dtype, of in found.items()]
    for _, body in sections:
        say(body)
    card = write_card("same_text", "How often a seed draws another text", sections, asdict(size), args, given)
    plain = {
        dtype: {how: {way: asdict(c) for way, c in ways.items()} for how, ways in of.items()}
        for dtype, of in found.items()
    }
    print(json.dumps({"benchmark": "same_text", **plain, "card": None if card is None else str(card)}))
    return 0


def compare(size: Size, dtype: str, num_seeds: int) -> dict[str, Compared]:
    """Each of the ways but the first beside the first, over all seeds."""
    model = make_model(replace(QUICK_SHAPE, vocab_size=size.vocab_size)).to(getattr(torch, dtype))
    chance = random.Random(0)
    prompts = [
        {
            "id": str(i),
            "prompt_token_ids": [chance.randrange(size.vocab_size) for _ in range(chance.randrange(50, 200))],
        }
        for i in range(size.num_prompts)
    ]
    found = {way: Compared() for way in list(WAYS)[1:]}
    before: list[RolloutResult] = []
    for seed in range(num_seeds):
        params = SamplingParams(max_new_tokens=size.new_tokens, seed=seed, ignore_eos=True)
        first, *others = (answers(model, dtype, grid, keys, prompts, params) for grid, keys in WAYS.values())
        assert [r.token_ids for r in first] != [r.token_ids for r in before], "the seed decides nothing"
        before = first
        for way, other in zip(found, others, strict=True):
            for pair in zip(first, other, strict=True):
                found[way] = found[way].and_also(*pair)
    return found


def answers(
    model: Any, dtype: str, grid: RankGrid, keys: dict[str, int], prompts: list[Any], params: SamplingParams
) -> list[RolloutResult]:
    config = {"dtype": dtype, "kv_cache_gib": 2**-5, **keys}

    def generate(topology: cpinfer.Topology) -> list[RolloutResult]:
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            return engine.generate(prompts, params)

    return run_ranks(grid, generate)[0]


def draw_by_inverse_cdf(logprobs: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """What `engine.sampling` does not do."""
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    at = torch.from_numpy(np.exp(-exponentials(requests, 1))) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1)


def describe(found: dict[str, dict[str, Compared]]) -> str:
    races, by_cdf = found["races"], found["inverse CDF"]
    rows = [
        [way, c.share, f"{c.num_tokens:,}", by_cdf[way].share, f"{c.max_logprob_difference:.1e}"]
        for way, c in races.items()
    ]
    header = ["beside one rank", "answers that differ", "tokens compared", "by the inverse CDF", "logprobs differ by"]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
