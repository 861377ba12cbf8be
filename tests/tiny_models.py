"""Small random models of every family, with attention as peaked as that of trained ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
# Latents of 24 + 8 values for heads of 16 + 8; layers of both kinds: a dense MLP first, then experts.
LATENT = {
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
HEADS_OF_16 = {"head_dim": 16}
ALTERNATING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
# Two value heads for a key head, of other dims.
GATED_DELTA = {
    **HEADS_OF_16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
SHARED_EXPERT = {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32}
# What a family's config has beside the sizes above; each with what is its own switched on, as far as it runs under tp.
SETTINGS: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "arcee": HEADS_OF_16,
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, **HEADS_OF_16, **ALTERNATING},
    "ernie4_5": HEADS_OF_16,
    "exaone4": ALTERNATING,
    "gemma": HEADS_OF_16,
    "glm4": {**HEADS_OF_16, "eos_token_id": []},  # None has a meaning of its own there
    "glm4_moe": {
        **HEADS_OF_16,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.5,
    },
    "granitemoe": {
        **EXPERTS,
        "num_local_experts": 4,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.5,
    },
    "helium": {"head_dim": 8},  # its o_proj takes as many values as the model has
    "minimax_m2": {**EXPERTS, **HEADS_OF_16, "num_local_experts": 4, "rotary_dim": 8},
    "nemotron": HEADS_OF_16,
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmoe": {**EXPERTS, "num_experts": 4},
    "phi3": {"sliding_window": 24},
    "phimoe": {**EXPERTS, "num_local_experts": 4, "sliding_window": 24},
    "seed_oss": HEADS_OF_16,
    "smollm3": {**ALTERNATING, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "starcoder2": {"sliding_window": 24},
    "qwen3_next": {**GATED_DELTA, **EXPERTS, **SHARED_EXPERT},
    "qwen3_5_text": GATED_DELTA,
    "qwen3_5_moe_text": {**GATED_DELTA, **EXPERTS, **SHARED_EXPERT},
    "olmo_hybrid": {key: value for key, value in GATED_DELTA.items() if key != "head_dim"},
    "kimi_linear": {
        **LATENT,
        "q_lora_rank": None,
        "num_local_experts": 8,
        "layer_types": GATED_DELTA["layer_types"],
        "linear_num_heads": 4,
        "linear_head_dim": 12,
        "linear_conv_kernel_dim": 4,
    },
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "mistral": MistralConfig(**TINY, sliding_window=24),
    "mixtral": MixtralConfig(**TINY, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**TINY, **EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=48),
    "gemma2": Gemma2Config(**TINY, head_dim=16, sliding_window=24, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(
        **TINY,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": GptOssConfig(
        **TINY, **EXPERTS, head_dim=16, sliding_window=24, num_local_experts=4, rope_parameters=YARN
    ),
    "deepseek_v2": DeepseekV2Config(**{**TINY, **LATENT}, q_lora_rank=None, rope_parameters=YARN),
    "deepseek_v3": DeepseekV3Config(
        **{**TINY, **LATENT}, q_lora_rank=32, rope_interleave=True, rope_parameters={**YARN, "mscale_all_dim": 1.0}
    ),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=128,
        n_embd=64,
        n_inner=96,
        n_layer=2,
        n_head=8,
        n_positions=512,
        multi_query=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    ),
    **{family: AutoConfig.for_model(family, **{**TINY, **settings}) for family, settings in SETTINGS.items()},
}


def make_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, the same on every call. Its attention logits have std about 3, its tokens are far from ties."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rows = _rows_that_make_logits(name.removesuffix(".weight"), config)
            if rows is not None and name.endswith(".weight"):
                rows(weight).mul_(20)
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                weight.normal_()
            if name.endswith("v_proj.bias"):  # a large one would be all that attention says, whatever it attends to
                weight.normal_(std=0.02)
            if name.endswith("q_norm.weight"):  # where queries are normalised, what made them larger is lost
                weight.add_(2)
            if name.endswith("A_log"):  # at random, states forget nearly all with each token
                weight.sub_(5)
            if name.endswith("sinks"):
                weight.normal_(std=2)
            if name.endswith("lm_head.weight"):
                weight.mul_(10)
    return model


def _rows_that_make_logits(name: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The part of a projection that becomes queries or keys, None for other weights."""
    kind = name.rsplit(".", 1)[-1]
    if kind in ("q_proj", "k_proj", "q_b_proj"):
        return lambda weight: weight
    if kind == "kv_a_proj_with_mqa":
        return lambda weight: weight[config.kv_lora_rank :]
    if kind == "kv_b_proj":
        heads = (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
        return lambda weight: weight.view(heads)[:, : config.qk_nope_head_dim]
    if kind == "qkv_proj":
        num_heads = config.num_attention_heads + config.num_key_value_heads
        return lambda weight: weight[: config.hidden_size // config.num_attention_heads * num_heads]
    if kind == "c_attn":
        head_dim = config.n_embd // config.n_head
        return lambda weight: weight[: config.n_embd + head_dim]
    return None


def prompts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Random token ids, the same on every call."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
