"""Models that are wrapped, compiled or sharded in ways that are not the usual ones, and what lending makes of them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lending_costs import GREEDY, PROMPTS
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from cpinfer.colocate.phase import rollout_phase
from cpinfer.config import JobConfig, parse_config
from cpinfer.errors import UserError
from cpinfer_integrations.lending import lend
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model
from trainers import changes, photograph, torch_trainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)


class ValueHead(nn.Module):
    """As RL libraries have it: the causal LM is `pretrained_model`, and beside it are values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model, self.config = model, model.config
        self.v_head = nn.Linear(model.config.hidden_size, 1)


def plain(family: str) -> Any:
    return make_model(copy.deepcopy(FAMILIES[family]))


def with_lora() -> Any:
    torch.manual_seed(1)
    return get_peft_model(plain("qwen2"), LORA)


def layers_sharded(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return model


def adapted_and_sharded() -> Any:
    model = with_lora()
    layers_sharded(model.get_base_model())
    return fully_shard(model)


def attention_sharded() -> Any:
    """Whose class is FSDP's then, and no longer one of the family's file."""
    model = plain("deepseek_v3")
    for layer in model.model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer)
    return fully_shard(model)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def sharded_by_transformers() -> Any:
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        plain("qwen2").save_pretrained(Path(folders[0]))
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folders[0], distributed_config=DistributedConfig(tp_size=2))


# What is trained, the whole model it is, and how its weights come.
WORKS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "layers sharded, full": (lambda: layers_sharded(plain("qwen2")), lambda: plain("qwen2"), "full"),
    "layers sharded, layerwise": (lambda: layers_sharded(plain("qwen2")), lambda: plain("qwen2"), "layerwise"),
    "adapted, full": (adapted_and_sharded, with_lora, "full"),
    "adapted, layerwise": (adapted_and_sharded, with_lora, "layerwise"),
    "adapted and sharded at once, layerwise": (lambda: fully_shard(with_lora()), with_lora, "layerwise"),
    "attention sharded, layerwise": (attention_sharded, lambda: plain("deepseek_v3"), "layerwise"),
    "compiled in DDP": (
        lambda: DistributedDataParallel(compiled(plain("qwen2"))),
        lambda: plain("qwen2"),
        "full",
    ),
    "DDP compiled": (lambda: compiled(DistributedDataParallel(plain("qwen2"))), lambda: plain("qwen2"), "full"),
    "compiled and sharded": (
        lambda: compiled(fully_shard(layers_sharded(plain("qwen2")))),
        lambda: plain("qwen2"),
        "layerwise",
    ),
    "sharded by Transformers": (sharded_by_transformers, lambda: plain("qwen2"), "full"),
}


def config_of(gather: str, tp_size: int = 1) -> JobConfig:
    return parse_config(
        {
            "dtype": "float32",
            "kv_cache_gib": 0.001,
            "tensor_parallel": {"tp_size": tp_size, "provider": "transformers"},
            "prefill_context_parallel_size": 2 // tp_size,
            "rollout": {"gather": gather},
        }
    )


def run() -> dict[str, Any]:
    return {"cases": dict(_cases()), "refused": dict(_refusals()), "bfloat16": _half_precision_layers()}


def _cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (make, make_whole, gather) in WORKS.items():
        trained, whole = make(), make_whole()
        trainer = torch_trainer(trained, _inside(trained))
        config = config_of(gather, 2 if "Transformers" in name else 1)
        before = photograph(trainer)
        lent = lend(trained, config)
        for _ in range(2):
            with rollout_phase(lent, config) as engine:
                results = engine.generate(PROMPTS, GREEDY)
        lent.topology.close()
        changed = changes(before, photograph(trainer))
        yield name, {"changed": changed, **_against(whole, results), "trains_on": trainer.micro_step() > 0}


def _inside(trained: Any) -> Any:
    while isinstance(trained, DistributedDataParallel) or hasattr(trained, "_orig_mod"):
        trained = trained.module if isinstance(trained, DistributedDataParallel) else trained._orig_mod
    return trained


def _against(whole: Any, results: list[Any]) -> dict[str, Any]:
    scores = [check_rollout.score(whole, r.prompt_token_ids, r.token_ids) for r in results]
    return {
        "same_tokens": [
            list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, 8) for r in results
        ],
        "worst": max(
            (found - torch.tensor(r.logprobs)).abs().max().item() for found, r in zip(scores, results, strict=True)
        ),
    }


def _half_precision_layers() -> dict[str, Any]:
    """Layers that FSDP brings in bfloat16, between an embedding and a head in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    trainer = torch_trainer(model := layers_sharded(plain("qwen2"), mp_policy=policy), model)
    config = replace(config_of("layerwise"), dtype="bfloat16")
    lent = lend(model, config)
    with rollout_phase(lent, config) as engine:
        results = engine.generate(PROMPTS, GREEDY)
        # Both shards of a token's keys and values, of 2 KV heads of 8 values in 2 layers.
        num_values = engine.kv_capacity_tokens // 2 * 2 * 2 * 8 * 2
        cached_bytes = engine.kv_pool_bytes / num_values
    lent.topology.close()
    trainer.trained.eval()
    ours = torch.cat([torch.tensor(r.logprobs) for r in results])
    training, exact = (torch.cat([_logprobs(of, r) for r in results]) for of in (model, plain("qwen2")))
    return {
        "off_by": (ours - training).abs().mean().item(),
        "float32_off_by": (exact - training).abs().mean().item(),
        "cached_bytes_per_value": cached_bytes,
    }


@torch.no_grad()
def _logprobs(model: Any, result: Any) -> torch.Tensor:
    ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
    first = len(result.prompt_token_ids) - 1
    logits = model(input_ids=ids, use_cache=False).logits[0, first:-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, first + 1 :, None])[:, 0]


def _refusals() -> Iterator[tuple[str, str]]:
    with_values = ValueHead(plain("qwen2"))
    fully_shard(with_values)
    asked = {
        "a value head sharded": (with_values, config_of("layerwise")),
        "another tp than the mesh's": (sharded_by_transformers(), config_of("full")),
    }
    for name, (trained, config) in asked.items():
        try:
            lent = lend(trained, config)
            with rollout_phase(lent, config):
                yield name, "it was lent"
            lent.topology.close()
        except UserError as error:
            yield name, str(error)
