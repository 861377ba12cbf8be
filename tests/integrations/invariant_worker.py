"""Ranks train by forwards that have the bits of their deterministic rollouts; rank 0 prints what all have found.

torchrun --nproc-per-node 2 tests/integrations/invariant_worker.py ddp/qwen2/float32 tools/async/bfloat16
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cpinfer
from cpinfer.colocate.phase import rollout_phase
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer_integrations.deepspeed import init_distributed, launch_inference
from cpinfer_integrations.lending import lend
from tiny_models import FAMILIES, make_model, prompts_of
from trainers import Trainer, deepspeed_trainer, everywhere, torch_trainer

SAMPLING = SamplingParams(temperature=0.7, seed=5, max_new_tokens=9)
PROMPTS = prompts_of((5, 40, 17, 90, 8, 33), vocab_size=128)
NUM_STEPS = 2


def trainer_of(kind: str, model: Any) -> Trainer:
    if kind.startswith("zero"):
        return deepspeed_trainer(int(kind[4]), model, micro_steps=1)
    if kind == "ddp":
        return torch_trainer(DistributedDataParallel(model), model)
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    return torch_trainer(model, model)


def run(kind: str, family: str, dtype: str) -> dict[str, Any]:
    """The largest difference of logprobs in each step, and that of a forward that is not invariant."""
    settings = copy.deepcopy(FAMILIES[family])
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
        setattr(settings, name, 0.0)
    model = make_model(settings).to(getattr(torch, dtype))
    keys = {"dtype": dtype, "kv_cache_gib": 0.002, "block_size": 4, "deterministic": True}
    gather = kind.partition(":")[2] or "full"
    config = parse_config({**keys, "prefill_context_parallel_size": 2, "rollout": {"gather": gather}})
    trainer = trainer_of(kind, model)
    own = PROMPTS[dist.get_rank() :: 2]

    def phase(step: int) -> float:
        lent = lend(trainer.trained, config)
        with rollout_phase(lent, config, weights_version=step) as engine:
            results = engine.generate_pooled(own * 2, SAMPLING, name=f"step {step}")
        lent.topology.close()
        return largest_difference(trainer.trained, results, batch_size=2 + dist.get_rank())

    apart = []
    with cpinfer.invariant_training(trainer.trained, config):
        for step in range(NUM_STEPS):
            apart.append(phase(step))
            for _ in range(2):  # the optimiser takes every other step
                trainer.micro_step()
                trainer.step()
    return {"apart": apart, "otherwise": phase(NUM_STEPS)}


def run_tp(family: str, dtype: str) -> dict[str, Any]:
    """Of forwards alone, over weights that DeepSpeed's AutoTP has dealt to two ranks."""
    model, own_dtype = make_model(FAMILIES[family]), getattr(torch, dtype)
    launched = launch_inference(model.to(own_dtype), RankGrid(tp_size=2), dtype=own_dtype)
    keys = {"dtype": dtype, "kv_cache_gib": 0.002, "block_size": 4, "deterministic": True}
    config = parse_config({**keys, "tensor_parallel": {"tp_size": 2}, "prefill_context_parallel_size": 1})
    with cpinfer.attach(launched.module, launched.topology, config) as engine:
        results = engine.generate(PROMPTS, SAMPLING)
    with cpinfer.invariant_training(launched.module, config):
        apart = [largest_difference(launched.module, results, batch_size=3)]
    otherwise = largest_difference(launched.module, results, batch_size=3)
    launched.topology.close()
    return {"apart": apart, "otherwise": otherwise}


def largest_difference(model: Any, results: Sequence[Any], batch_size: int) -> float:
    found = cpinfer.training_logprobs(
        model,
        [r.prompt_token_ids for r in results],
        [r.token_ids for r in results],
        temperature=SAMPLING.temperature,
        batch_size=batch_size,
        num_batches=3,
        pad_token_id=0,
    )
    pairs = zip(found, results, strict=True)
    return max(abs(a - b) for told, r in pairs for a, b in zip(told, r.processed_logprobs, strict=True))


def main(cases: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For every case what every rank has found."""
    outcomes = []
    for case in cases:
        kind, which, dtype = case.split("/")
        if kind == "tools":
            from invariant_tools import run_tools  # TRL, which takes longer to import than the other cases to run

            with TemporaryDirectory() as folder:
                found = run_tools(which, dtype, Path(folder))
        else:
            found = run_tp(which, dtype) if kind == "tp2" else run(kind, which, dtype)
        outcomes.append(everywhere({"case": case, **found}))
    return outcomes


if __name__ == "__main__":
    with redirect_stdout(sys.stderr), default_group(Launch.from_environ(os.environ)):
        if any(case.startswith("zero") for case in sys.argv[1:]):
            init_distributed()
        outcomes = main(sys.argv[1:])
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"outcomes": outcomes}), flush=True)
