"""Rank 1 does something else than rank 0, in one way after another; each rank writes what came of it.

torchrun --nproc-per-node 2 tests/distributed/same_call_worker.py OUTPUT
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

CONFIG = {
    "dtype": "float32",
    "prefill_context_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "kv_cache_gib": 2**-8,
}
PROMPTS = [list(tokens) for tokens in prompts_of((5, 40, 9), vocab_size=128)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=4)
LENGTHS = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (2, 5, 9)]


def generate(prompts: Any = PROMPTS, sampling: Any = GREEDY) -> Callable[[cpinfer.Engine], Any]:
    return lambda engine: [r.token_ids for r in engine.generate(prompts, sampling)]


def leave_early(engine: cpinfer.Engine) -> None:
    for _ in engine.stream(PROMPTS, LENGTHS):
        break


def raise_early(engine: cpinfer.Engine) -> None:
    for _ in engine.stream(PROMPTS, LENGTHS):
        raise KeyError("the consumer's own")


def move_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1e-4)


# By name: what rank 0 does, what rank 1 does, rank 1's config, and what becomes of rank 1's weights.
SCENARIOS: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "the same": (generate(), generate(), {}, None),
    "block_size": (generate(), generate(), {"block_size": 32}, None),
    "decode_exchange": (generate(), generate(), {"decode_exchange": "ag_rs"}, None),
    "wire dtype": (generate(), generate(), {"cp_wire_dtype": "bfloat16"}, None),
    "weights": (generate(), generate(), {}, move_weights),
    "prompts": (generate(), generate(PROMPTS[::-1]), {}, None),
    "one prompt fewer": (generate(), generate(PROMPTS[:2]), {}, None),
    "seed": (generate(), generate(sampling=dataclasses.replace(GREEDY, seed=1)), {}, None),
    "n": (generate(), generate(sampling=dataclasses.replace(GREEDY, n=2)), {}, None),
    "score": (generate(), lambda engine: engine.score([(PROMPTS[0], [1])]), {}, None),
    "leave early": (generate(sampling=LENGTHS), leave_early, {}, None),
    "raise early": (generate(sampling=LENGTHS), raise_early, {}, None),
    "the same again": (generate(), generate(), {}, None),
}


def outcome_of(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": call()}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main(output: str) -> None:
    launch = Launch.from_environ(os.environ)
    outcomes = {}
    with default_group(launch):
        topology = cpinfer.Topology.from_world(RankGrid(pcp_size=2, dcp_size=2))
        for name, (zero, one, changes, touch) in SCENARIOS.items():
            model = make_model(FAMILIES["qwen2"])
            if launch.rank == 1 and touch is not None:
                touch(model)
            config = parse_config({**CONFIG, **changes} if launch.rank == 1 else CONFIG)
            call = one if launch.rank == 1 else zero
            outcomes[name] = outcome_of(lambda: attach_and(call, model, topology, config))  # noqa: B023
        topology.close()
        other = RankGrid(pcp_size=2, dcp_size=1 + launch.rank)
        outcomes["grid"] = outcome_of(lambda: cpinfer.Topology.from_world(other))
    with open(f"{output}.{launch.rank}", "w", encoding="utf-8") as file:
        json.dump(outcomes, file)


def attach_and(call: Any, model: Any, topology: cpinfer.Topology, config: cpinfer.JobConfig) -> Any:
    with cpinfer.attach(model, topology, config) as engine:
        return call(engine)


if __name__ == "__main__":
    main(sys.argv[1])
