"""Loads sharded models as each rank reads them, and as they come of whole ones; rank 0 prints where these differ.

torchrun --nproc-per-node 2 tests/integrations/loading_worker.py FOLDER '[{"family": "qwen2", "dtype": "bfloat16"}]'
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import JobConfig
from cpinfer.layout.grid import RankGrid
from cpinfer.models.local_weights import local
from cpinfer_integrations.deepspeed import cut_by_autotp, init_distributed
from cpinfer_integrations.launching import launch_inference
from cpinfer_tools.run_config import parse_run_config
from tiny_models import FAMILIES, make_model


def main(folder: str, cases: list[dict[str, Any]]) -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        init_distributed()
        outcomes = [run(launch, Path(folder), **case) for case in cases]
    if launch.rank == 0:
        print(json.dumps({"outcomes": outcomes}), flush=True)


def run(
    launch: Launch, folder: Path, family: str, provider: str, dtype: str = "float32", **changes: Any
) -> dict[str, Any]:
    folder = folder / "-".join([family, *map(str, changes.values())])
    if launch.rank == 0 and not folder.exists():
        model = make_model(type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), **copy.deepcopy(changes)}))
        model.save_pretrained(folder, max_shard_size="100KB")
    dist.barrier()
    told: list[tuple[int, int]] = []
    config = parse_run_config(
        {
            "model": str(folder),
            "dtype": dtype,
            "tensor_parallel": {"tp_size": launch.world_size, "provider": provider},
        }
    )
    ours, topology = launch_inference(
        config, RankGrid(launch.world_size), launch.device, lambda *read: told.append(read)
    )
    whole, sharded = of_whole(launch, config)
    topology.close()
    weights = {name: local(weight.detach()) for name, weight in ours.named_parameters()}
    theirs = {name: local(weight.detach()) for name, weight in sharded.named_parameters()}
    buffers, whole_buffers = dict(ours.named_buffers()), dict(whole.named_buffers())
    # Those that AutoTP rounds with the weights, and that Transformers keeps in float32: the whole model's are right.
    kept = {name: w.detach() for name, w in whole.named_parameters() if w.dtype != getattr(torch, dtype)}
    everyone: list[Any] = [None] * launch.world_size
    told_here = {
        "other_weights": differing(weights, {**theirs, **kept}),
        "other_buffers": differing(buffers, whole_buffers),
        "digests": {name: digest(weight) for name, weight in weights.items()},
        "read": told[-1],
    }
    dist.all_gather_object(everyone, told_here)
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return {"family": family, "ranks": everyone, "file_bytes": sum(files), "num_files": len(files)}


def of_whole(launch: Launch, config: JobConfig) -> tuple[Any, Any]:
    """The whole model, and what the provider alone makes of it."""
    assert config.model is not None
    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": dtype}
    whole = AutoModelForCausalLM.from_pretrained(config.model, **options)
    if config.tensor_parallel.provider == "transformers":
        shards = DistributedConfig(tp_size=launch.world_size)
        return whole, AutoModelForCausalLM.from_pretrained(config.model, distributed_config=shards, **options)
    grid = RankGrid(launch.world_size)
    return whole, cut_by_autotp(copy.deepcopy(whole), grid, dist.group.WORLD, dtype).module


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same in both: bits, dtype, or in one of them alone."""
    return sorted(
        name
        for name in found.keys() | wanted.keys()
        if name not in found
        or name not in wanted
        or found[name].dtype != wanted[name].dtype
        or not torch.equal(found[name], wanted[name])
    )


def digest(weight: torch.Tensor) -> str:
    return hashlib.blake2b(weight.contiguous().view(-1).view(torch.uint8).numpy().data, digest_size=8).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
