"""A job that holds an Accelerator lends it to cpinfer; rank 0 prints what came of it as one JSON line.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/integrations/accelerate_worker.py \
    FOLDER plain mesh:cp=2 mesh:tp=2
accelerate launch --use_deepspeed --zero_stage 0 --num_processes 2 tests/integrations/accelerate_worker.py \
    FOLDER {deepspeed:cp=2|deepspeed:tp=2}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.parallelism_config import ParallelismConfig
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import check_rollout
import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer_integrations.accelerate import topology_from, topology_from_mesh
from cpinfer_integrations.deepspeed import init_distributed
from tiny_models import FAMILIES, make_model, prompts_of


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


@contextmanager
def counted_groups() -> Iterator[list[list[int]]]:
    created: list[list[int]] = []
    new_group = dist.new_group

    def counting_new_group(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        created.append(list(ranks))
        return new_group(ranks, *args, **kwargs)

    dist.new_group = counting_new_group
    yield created
    dist.new_group = new_group


def run(kind: str, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    mesh = accelerator.torch_device_mesh
    if kind.startswith("mesh"):
        mesh = parallelism(kind).build_device_mesh("cpu")
    with counted_groups() as created:
        topology = topology_from_mesh(mesh) if kind.startswith("mesh") else topology_from(accelerator)
    grid = topology.grid
    config = parse_config(
        {
            "dtype": "float32",
            "tensor_parallel": {"tp_size": grid.tp_size, "provider": "transformers"},
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
        }
    )
    module = model_for(kind, accelerator, folder)
    before = {name: local(weight).clone() for name, weight in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    hooks = [list(m._forward_pre_hooks) for m in module.modules()]
    attention = module.config._attn_implementation
    with cpinfer.attach(module, topology, config) as engine:
        results = engine.generate(prompts_of((3, 40), vocab_size=128), SamplingParams(temperature=0, max_new_tokens=8))
    topology.close()
    whole = make_model(FAMILIES["qwen2"])
    return {
        "kind": kind,
        "grid": [grid.tp_size, grid.pcp_size, grid.dcp_size, grid.dp_size],
        "created": created,
        "tp_group_is_the_meshs": topology.tp_group is (mesh["tp"].get_group() if grid.tp_size > 1 else None),
        "same_tokens": [
            list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, 8) for r in results
        ],
        "weights_untouched": all(torch.equal(before[n], local(w)) for n, w in module.state_dict().items()),
        "modes_restored": modes == [m.training for m in module.modules()],
        "hooks_untouched": hooks == [list(m._forward_pre_hooks) for m in module.modules()],
        "attention_restored": attention == module.config._attn_implementation,
    }


def local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        accelerator = accelerator_for(sys.argv[2])
        outcomes = [run(kind, accelerator, Path(sys.argv[1]) / kind) for kind in sys.argv[2:]]
    if accelerator.is_main_process:
        print(json.dumps({"num_processes": accelerator.num_processes, "outcomes": outcomes}), flush=True)
    dist.destroy_process_group()
