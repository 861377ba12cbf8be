"""Generates on models that Transformers or AutoTP sharded; rank 0 prints how that differs from the unsharded models.

torchrun --nproc-per-node 2 tests/integrations/sharded_worker.py FOLDER '[{"family": "qwen2", "tp": 2, ...}]'
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations import deepspeed, transformers
from cpinfer_tools.verify import check_rollout
from routers import num_other_experts
from tiny_models import FAMILIES, make_model, prompts_of


def main(folder: str, cases: list[dict[str, Any]]) -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        outcomes = [run(launch, Path(folder), **case) for case in cases]
    if launch.rank == 0:
        print(json.dumps({"outcomes": outcomes}), flush=True)


def run(
    launch: Launch, folder: Path, family: str, tp: int, pcp: int, dcp: int, provider: str, **changes: Any
) -> dict[str, Any]:
    whole = make_model(FAMILIES[family])
    if provider == "autotp":
        sharded = make_model(copy.deepcopy(FAMILIES[family]))
        launched: Any = deepspeed.launch_inference(sharded, RankGrid(tp, pcp, dcp), dtype=torch.float32)
    else:
        if launch.rank == 0:
            whole.save_pretrained(folder / family)
        dist.barrier()
        launched = transformers.launch_inference(str(folder / family), RankGrid(tp, pcp, dcp), dtype=torch.float32)
    config = parse_config(
        {
            "dtype": "float32",
            "tensor_parallel": {"tp_size": tp, "provider": provider},
            "prefill_context_parallel_size": pcp,
            "decode_context_parallel_size": dcp,
            "cp_kv_cache_interleave_size": 3,
            "block_size": 4,
            **changes,
        }
    )
    has_experts = hasattr(whole.config, "num_experts_per_tok")
    sampling = SamplingParams(temperature=0, max_new_tokens=10, routed_experts=has_experts)
    with cpinfer.attach(launched.module, launched.topology, config) as engine:
        results = engine.generate(prompts_of((1, 3, 17, 70, 150), vocab_size=128), sampling)
    launched.topology.close()
    differences = [
        (check_rollout.score(whole, r.prompt_token_ids, r.token_ids) - torch.tensor(r.logprobs)).abs().max().item()
        for r in results
    ]
    same = [list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, 10) for r in results]
    return {
        "family": family,
        "same_tokens": same,
        "max_abs_logprob_difference": max(differences),
        "num_other_experts": sum(num_other_experts(whole, r) for r in results) if has_experts else 0,
    }


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
