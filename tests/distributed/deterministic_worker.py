"""Generates in layouts one after another on the processes it was started with; rank 0 writes all that each gave.

torchrun --nproc-per-node 2 tests/distributed/deterministic_worker.py OUTPUT '[{"pcp": 2, "dcp": 2}]'
"""

from __future__ import annotations

import copy
import json
import os
import sys
from typing import Any

import torch

import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

VOCAB = 128
SAMPLING = SamplingParams(temperature=0.8, seed=5, n=2, max_new_tokens=7, top_logprobs=VOCAB)


def main(output: str, layouts: list[dict[str, Any]]) -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        for layout in layouts:
            found = run(launch, **layout)
            if launch.rank == 0:
                with open(output, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"layout": layout, "found": found}) + "\n")


def run(
    launch: Launch, pcp: int, dcp: int, tp: int = 1, family: str = "qwen2", dtype: str = "float32", **changes: Any
) -> list[Any]:
    """Tokens, and logprobs of the whole vocabulary, of every sample."""
    model, grid = make_model(copy.deepcopy(FAMILIES[family])).to(getattr(torch, dtype)), RankGrid(tp, pcp, dcp)
    if tp > 1:
        from cpinfer_integrations.deepspeed import launch_inference

        launched = launch_inference(model, grid, dtype=getattr(torch, dtype))
        model, topology = launched.module, launched.topology
    else:
        topology = cpinfer.Topology.from_world(grid)
    prompts = [
        {"prompt_token_ids": tokens, "id": f"prompt {i}"}
        for i, tokens in enumerate(prompts_of((5, 40, 17, 133, 8, 211, 30), vocab_size=VOCAB))
    ]
    keys = {"dtype": dtype, "tensor_parallel": {"tp_size": tp}, "kv_cache_gib": 2**-7, "block_size": 4, **changes}
    sizes = {"prefill_context_parallel_size": pcp, "decode_context_parallel_size": dcp}
    with cpinfer.attach(model, topology, parse_config({"deterministic": True, **keys, **sizes})) as engine:
        results = engine.generate(prompts, SAMPLING)
    topology.close()
    return [(r.token_ids, r.logprobs, r.processed_logprobs, r.top_logprobs) for r in results]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
