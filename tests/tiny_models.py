"""Small random models of every family, with attention as peaked as that of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

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
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "mistral": MistralConfig(**TINY, sliding_window=None),
}


def make_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, the same on every call. Its attention logits have std about 3, its tokens are far from ties."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(20)
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                weight.normal_()
            if name.endswith("v_proj.bias"):  # a large one would be all that attention says, whatever it attends to
                weight.normal_(std=0.02)
            if name.endswith("lm_head.weight"):
                weight.mul_(10)
    return model


def prompts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Random token ids, the same on every call."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
