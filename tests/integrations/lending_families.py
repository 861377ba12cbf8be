"""Latent attention, experts and adapters whose weights ZeRO-3 has sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from lending_costs import GREEDY, PROMPTS
from peft import LoraConfig, get_peft_model

from cpinfer.colocate.phase import rollout_phase
from cpinfer.config import JobConfig
from cpinfer_integrations.lending import lend
from cpinfer_tools.verify import check_rollout
from routers import num_other_experts
from tiny_models import FAMILIES, make_model
from trainers import changes, deepspeed_trainer, photograph

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)


def make(name: str) -> Any:
    family, _, adapter = name.partition("+")
    model = make_model(copy.deepcopy(FAMILIES[family]))
    torch.manual_seed(1)
    return get_peft_model(model, LORA) if adapter else model


def run(config_of: Callable[[str], JobConfig]) -> dict[str, Any]:
    return {"cases": list(_cases(config_of))}


def _cases(config_of: Callable[[str], JobConfig]) -> Iterator[dict[str, Any]]:
    for name in ("deepseek_v3", "mixtral", "qwen2+lora"):
        trainer, whole = deepspeed_trainer(3, make(name)), make(name)
        for kind in ("zero3:full", "zero3:layerwise", "zero3:tp_shards"):
            if name == "qwen2+lora" and kind == "zero3:tp_shards":  # refused
                continue
            config, before = config_of(kind), photograph(trainer)
            lent = lend(trainer.trained, config)
            has_experts = hasattr(whole.config, "num_experts_per_tok")
            with rollout_phase(lent, config) as engine:
                results = engine.generate(PROMPTS, replace(GREEDY, routed_experts=has_experts))
            lent.topology.close()
            scores = [check_rollout.score(whole, r.prompt_token_ids, r.token_ids) for r in results]
            yield {
                "name": f"{name} {kind}",
                "num_other_experts": sum(num_other_experts(whole, r) for r in results) if has_experts else None,
                "changed": changes(before, photograph(trainer)),
                "same_tokens": [
                    list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, 8) for r in results
                ],
                "worst": max(
                    (found - torch.tensor(r.logprobs)).abs().max().item()
                    for found, r in zip(scores, results, strict=True)
                ),
            }
