"""A job that holds a DeepSpeed engine lends it to cpinfer; rank 0 prints what came of it as one JSON line.

torchrun --nproc-per-node 2 tests/integrations/deepspeed_worker.py {inference|training} TP
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import check_rollout
import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.deepspeed import init_distributed, launch_inference, topology_from
from tiny_models import FAMILIES, make_model, prompts_of


def training_engine(tp_size: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
    }
    if tp_size > 1:
        config["tensor_parallel"] = {"autotp_size": tp_size}
    model = make_model(FAMILIES["qwen2"])
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def main(kind: str, tp_size: int) -> dict[str, Any]:
    init_distributed()
    if kind == "training":
        engine = training_engine(tp_size)
    else:
        grid = RankGrid(tp_size=tp_size, pcp_size=dist.get_world_size() // tp_size)
        engine = launch_inference(make_model(FAMILIES["qwen2"]), grid, dtype=torch.float32).engine

    created: list[list[int]] = []
    new_group = dist.new_group

    def counting_new_group(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        created.append(list(ranks))
        return new_group(ranks, *args, **kwargs)

    dist.new_group = counting_new_group
    topology = topology_from(engine)
    dist.new_group = new_group
    grid = topology.grid
    config = parse_config(
        {
            "dtype": "float32",
            "tensor_parallel": {"tp_size": tp_size},
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
        }
    )
    prompts = prompts_of((3, 40), vocab_size=128)
    module = engine.module
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    hooks = [list(m._forward_pre_hooks) for m in module.modules()]
    with cpinfer.attach(module, topology, config) as inference:
        results = inference.generate(prompts, SamplingParams(temperature=0, max_new_tokens=8))
    topology.close()
    whole = make_model(FAMILIES["qwen2"])
    return {
        "grid": [grid.tp_size, grid.pcp_size, grid.dcp_size, grid.dp_size],
        "created": created,
        "tp_group_is_the_engines": topology.tp_group is _tp_group(engine, kind, tp_size),
        "same_tokens": [
            list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, 8) for r in results
        ],
        "weights_untouched": all(torch.equal(before[n], w) for n, w in module.state_dict().items()),
        "modes_restored": modes == [m.training for m in module.modules()],
        "hooks_untouched": hooks == [list(m._forward_pre_hooks) for m in module.modules()],
    }


def _tp_group(engine: Any, kind: str, tp_size: int) -> Any:
    if kind == "inference":
        return engine.mp_group
    return deepspeed.utils.groups.get_tensor_model_parallel_group() if tp_size > 1 else None


if __name__ == "__main__":
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        with redirect_stdout(sys.stderr):
            outcome = main(sys.argv[1], int(sys.argv[2]))
        if launch.rank == 0:
            print(json.dumps(outcome), flush=True)
