"""Stage model: whole models of a few layers, generated from by played ranks, against Transformers alone.

Every token that the engine sampled is scored again by one forward of the whole model, in the engine's dtype (what a
trainer would do) and in float32 (what both approach).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.comm.threads import run_ranks
from cpinfer.config import KV_CACHE_DTYPES, SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.gpu.stage import Figure, Found, Setting
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, ModelShape, make_model, random_prompts
from cpinfer_tools.verify import check_rollout

GRIDS = (RankGrid(), RankGrid(1, 2, 2), RankGrid(1, 4, 4), RankGrid(1, 4, 2), RankGrid(1, 8, 8))
# Of float32, in which the smoke run is. Half precision is judged by what rounding does to the forward itself: logits of
# random weights are so large that it keeps steps of 0.03 of them, and 1e-3 is for models that have learnt something.
TOLERANCE = 1e-5
# Of the mean error of the forward in the engine's dtype, that of the engine.
FURTHEST = 1.2


def run(setting: Setting) -> Found:
    """Mean and largest difference of logprobs, for each model and layout; over a cache in fp8 for one of them."""
    figures: list[Figure] = []
    for name, model in models(setting):
        exact = copy.deepcopy(model).float()
        for grid in GRIDS[:2] if setting.is_smoke else GRIDS:
            figures += _figures(f"{name} pcp={grid.pcp_size} dcp={grid.dcp_size}", model, exact, grid, setting)
        if not hasattr(model.config, "kv_lora_rank"):  # latents in fp8 have kernels on Hopper alone
            figures += _figures(f"{name} pcp=2 dcp=2, KV in fp8", model, exact, GRIDS[1], setting, "fp8_e4m3")
    return Found(tuple(figures))


def _figures(
    kind: str, model: Any, exact: Any, grid: RankGrid, setting: Setting, kv_cache_dtype: str = "auto"
) -> Iterator[Figure]:
    results = generate(model, grid, setting, kv_cache_dtype=kv_cache_dtype)
    kept = KV_CACHE_DTYPES[kv_cache_dtype]
    kv_dtype = None if kept is None else getattr(torch, kept)
    ours = torch.cat([torch.tensor(r.logprobs) for r in results])
    forward, truth = (torch.cat([_score(m, r, kv_dtype) for r in results]) for m in (model, exact))
    own, ideal, theirs = (forward - ours).abs(), (truth - ours).abs(), (forward - truth).abs()
    # Rounding differs between kernels; neither may be further from the truth. From one another they are as far as two
    # errors that know nothing of each other, whose squares add.
    target = float(math.hypot(1, FURTHEST) * theirs.mean()) + TOLERANCE
    yield Figure(f"{kind}: logprobs beside the forward, mean difference", float(own.mean()), "", target=target)
    yield Figure(f"{kind}: logprobs beside the forward, largest", float(own.max()), "")
    target = float(FURTHEST * theirs.mean()) + TOLERANCE
    yield Figure(f"{kind}: logprobs beside float32, mean difference", float(ideal.mean()), "", target=target)


def models(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Random models on the setting's device, of GQA and of latents, with what they are like."""
    yield "Qwen2-like", make_model(_shape(setting)).to(setting.device, setting.dtype)
    if setting.is_smoke:
        return
    yield "DeepSeek-V3-like", _deepseek().to(setting.device, setting.dtype)


def needs(setting: Setting) -> Iterator[AttentionNeeds]:
    """What those models ask of their kernels, over a cache in fp8 too."""
    shape = _shape(setting)
    calls = ((shape.num_q_heads, KVLayout(shape.num_kv_heads, shape.head_dim, shape.head_dim)),)
    yield AttentionNeeds(setting.dtype, calls, torch.float8_e4m3fn)
    if not setting.is_smoke:
        latents = KVLayout(1, 576, 512, v_is_prefix_of_k=True)
        yield AttentionNeeds(setting.dtype, ((16, latents), (16, KVLayout(16, 192, 128))))


def _shape(setting: Setting) -> ModelShape:
    """Of the model with GQA; FlashInfer wants heads of 64 at least."""
    if setting.is_smoke:
        return replace(QUICK_SHAPE, head_dim=64) if setting.is_cuda else QUICK_SHAPE
    return replace(ModelShape(), num_layers=4, hidden_size=1024, num_q_heads=16, num_kv_heads=4)


def _deepseek() -> Any:
    """Two layers with latents of the real size, without experts; its logits are made to vary."""
    config = DeepseekV3Config(
        num_hidden_layers=2,
        first_k_dense_replace=2,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=128,
        vocab_size=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_b_proj.weight", "kv_a_proj_with_mqa.weight", "lm_head.weight")):
                weight.mul_(8)
    return model


def generate(
    model: Any, grid: RankGrid, setting: Setting, *, top_logprobs: int = 0, **keys: object
) -> list[RolloutResult]:
    """What played ranks write behind prompts that they prefill in chunks; `keys` are those of an engine's config."""
    lengths, num_new = ((3, 40), 4) if setting.is_smoke else ((5, 130, 700, 2000), 32)
    if setting.is_smoke and setting.is_cuda:
        num_new = 16  # means of what rounding does
    prompts = random_prompts(lengths, model.config.vocab_size, seed=3)
    config = parse_config(
        {
            "backend": setting.backend_name,
            "kv_cache_gib": 2**-9 if setting.is_smoke else 0.25,
            # In chunks, so that prompts meet their own context.
            "max_num_batched_tokens": 32 if setting.is_smoke else 1024,
            **keys,
        }
    )
    sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True, top_logprobs=top_logprobs)

    def body(topology: cpinfer.Topology) -> list[RolloutResult]:
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            return engine.generate([list(p) for p in prompts], sampling)

    return run_ranks(grid, body, timeout_s=400)[0]


def _score(model: Any, result: RolloutResult, kv_dtype: torch.dtype | None) -> torch.Tensor:
    return check_rollout.score(model, result.prompt_token_ids, result.token_ids, kv_dtype)
