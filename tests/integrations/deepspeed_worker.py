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
from lent_model import counted_groups, grid_of, lend

from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.deepspeed import init_distributed, launch_inference, topology_from
from tiny_models import FAMILIES, make_model


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

    with counted_groups() as created:
        topology = topology_from(engine)
    return {
        "grid": grid_of(topology),
        "created": created,
        "tp_group_is_the_engines": topology.tp_group is _tp_group(engine, kind, tp_size),
        **lend(engine.module, topology, prepacked_gib=0.1 if kind == "inference" else 0.0),
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
