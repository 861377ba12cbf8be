"""A job that holds an Accelerator lends it to cpinfer; rank 0 prints what came of it as one JSON line.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/integrations/accelerate_worker.py \
    FOLDER plain mesh:cp=2 mesh:tp=2
accelerate launch --use_deepspeed --zero_stage 0 --num_processes 2 tests/integrations/accelerate_worker.py \
    FOLDER {deepspeed:cp=2|deepspeed:tp=2}
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.parallelism_config import ParallelismConfig
from lent_model import counted_groups, grid_of, lend
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from cpinfer_integrations.accelerate import topology_from, topology_from_mesh
from cpinfer_integrations.deepspeed import init_distributed
from tiny_models import FAMILIES, make_model


def parallelism(kind: str) -> ParallelismConfig:
    """What stands behind the colon."""
    sizes = [axis.split("=") for axis in kind.partition(":")[2].split(",")]
    return ParallelismConfig(**{f"{axis}_size": int(size) for axis, size in sizes})


def accelerator_for(kind: str) -> Accelerator:
    if not kind.startswith("deepspeed"):
        return Accelerator()
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    init_distributed()
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        parallelism_config=parallelism(kind),
    )
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    return accelerator


def model_for(kind: str, accelerator: Accelerator, folder: Path) -> Any:
    """The model as such a job holds it."""
    whole = make_model(FAMILIES["qwen2"])
    if "tp=" in kind:
        if accelerator.is_main_process:
            whole.save_pretrained(folder)
        dist.barrier()
        replicas = accelerator.num_processes // 2
        more = {"fsdp_size": 1, "dp_replicate_size": replicas} if replicas > 1 else {}
        config = DistributedConfig(tp_size=2, **more)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config).eval()
    if kind.startswith("mesh"):
        return whole
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    model, _ = accelerator.prepare(whole, optimizer)
    return accelerator.unwrap_model(model)


def run(kind: str, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    mesh = accelerator.torch_device_mesh
    if kind.startswith("mesh"):
        mesh = parallelism(kind).build_device_mesh("cpu")
    with counted_groups() as created:
        topology = topology_from_mesh(mesh) if kind.startswith("mesh") else topology_from(accelerator)
    return {
        "kind": kind,
        "grid": grid_of(topology),
        "created": created,
        "tp_group_is_the_meshs": topology.tp_group is (mesh["tp"].get_group() if topology.grid.tp_size > 1 else None),
        **lend(model_for(kind, accelerator, folder), topology, provider="transformers"),
    }


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        accelerator = accelerator_for(sys.argv[2])
        outcomes = [run(kind, accelerator, Path(sys.argv[1]) / kind) for kind in sys.argv[2:]]
    if accelerator.is_main_process:
        print(json.dumps({"num_processes": accelerator.num_processes, "outcomes": outcomes}), flush=True)
    dist.destroy_process_group()
