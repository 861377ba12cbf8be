"""What trainers are told that ask for what is refused, and what DeepSpeed's hooks would do if they did not sleep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from lending_costs import GREEDY, PROMPTS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cpinfer.colocate.phase import rollout_phase
from cpinfer.config import JobConfig, RolloutConfig, TensorParallel
from cpinfer.errors import UserError
from cpinfer_integrations import deepspeed_zero3
from cpinfer_integrations.lending import lend
from tiny_models import FAMILIES, make_model
from trainers import Trainer, changes, deepspeed_trainer, photograph

PCP2 = JobConfig(dtype="float32", kv_cache_gib=0.001, prefill_context_parallel_size=2)
REPLICAS = replace(PCP2, prefill_context_parallel_size=1)
TP2 = JobConfig(dtype="float32", kv_cache_gib=0.001, tensor_parallel=TensorParallel(2))


def gathering(how: str, config: JobConfig) -> JobConfig:
    return replace(config, rollout=RolloutConfig(gather=how))


def run() -> dict[str, Any]:
    """The first words of every refusal, and what changed in a job whose hooks ran."""
    zero2, zero3 = deepspeed_trainer(2), deepspeed_trainer(3)
    with_star_coder = deepspeed_trainer(3, make_model(FAMILIES["gpt_bigcode"]))
    sharded = fully_shard(make_model(FAMILIES["qwen2"]))
    ddp = DistributedDataParallel(make_model(FAMILIES["qwen2"]))
    fsdp1 = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its own __init__ refuses CPU
    nn.Module.__init__(fsdp1)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    both = parallelize_module(make_model(FAMILIES["qwen2"]), mesh["tp"], {"lm_head": ColwiseParallel()})
    asked = {
        "layerwise with replicas": (zero3.trained, gathering("layerwise", REPLICAS)),
        "fsdp2 layerwise with replicas": (sharded, gathering("layerwise", REPLICAS)),
        "tp_shards of zero2": (zero2.trained, gathering("tp_shards", TP2)),
        "tp_shards of fsdp2": (sharded, gathering("tp_shards", TP2)),
        "tp_shards of ddp": (ddp, gathering("tp_shards", TP2)),
        "tp_shards without tp": (zero3.trained, gathering("tp_shards", PCP2)),
        "tp_shards of fused heads": (with_star_coder.trained, gathering("tp_shards", TP2)),
        "fsdp1": (fsdp1, PCP2),
        "fsdp2 of a module around": (fully_shard(nn.Sequential(make_model(FAMILIES["qwen2"]))), PCP2),
        "a model in such a module": (fully_shard(nn.Sequential(make_model(FAMILIES["qwen2"])))[0], PCP2),
        "fsdp2 with tp": (fully_shard(both, mesh=mesh["dp"]), PCP2),
    }
    return {"refused": {name: refusal(*what) for name, what in asked.items()}, "awake": list(with_hooks_awake(zero3))}


def refusal(trained: Any, config: JobConfig) -> str:
    try:
        lend(trained, config).topology.close()
    except UserError as error:
        return str(error)
    return "it was lent"


def with_hooks_awake(trainer: Trainer) -> Iterator[str]:
    """The control of the photograph: what a phase of ZeRO-3 changes when DeepSpeed's hooks run in it."""

    @contextmanager
    def awake(*_: Any) -> Iterator[None]:
        yield

    for _ in range(2):
        trainer.micro_step()
        trainer.step()
    before = photograph(trainer)
    lent = lend(trainer.trained, PCP2)
    with (
        patch.object(deepspeed_zero3, "hooks_disabled", awake),
        rollout_phase(lent, PCP2) as engine,
    ):
        engine.generate(PROMPTS, GREEDY)
    lent.topology.close()
    yield from changes(before, photograph(trainer))
