"""A trainer of TRL's, whose model calls tools, by forwards that have the bits of its deterministic rollouts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tool_trainers import CONFIG, make_trainer
from trl import GRPOTrainer

import cpinfer
from cpinfer_integrations.trl import with_cpinfer


def run_tools(tool_loop: str, dtype: str, folder: Path) -> dict[str, Any]:
    """The largest difference in each step of TRL's trainer, and of one whose forward is not invariant."""
    layout = {"prefill_context_parallel_size": dist.get_world_size() if dist.is_initialized() else 1}
    config = {**CONFIG, **layout, "dtype": dtype, "deterministic": True, "rollout": {"tool_loop": tool_loop}}
    found = []
    for is_invariant in (True, False):
        options = {"top_k": 0, "max_completion_length": 80, "max_steps": 2}
        trainer = make_trainer(with_cpinfer(GRPOTrainer, config), folder, **options)
        trainer.model.to(getattr(torch, dtype))
        with cpinfer.invariant_training(trainer.model, config) if is_invariant else nullcontext():
            trainer.train()
        found.append([record.mismatch.max_abs for record in trainer.rollouts.records])
        trainer.rollouts.close()
    return {"apart": found[0], "otherwise": max(found[1])}
