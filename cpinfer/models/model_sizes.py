"""The sizes of a model that the cost of its steps depends on: counted where it is built, with or without values."""

from __future__ import annotations

from typing import Any

from cpinfer.layout.step_traffic import ModelSizes
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.spec import ModelSpec

_EXPERTS = ".experts."


def model_sizes(spec: ModelSpec, model: Any) -> ModelSizes:
    """Those of a whole model, of which no rank has a slice yet; its tensors may be on the meta device.

    UserError for a model without decoder layers. Experts of a layer are one tensor, `[experts, ...]`.
    """
    num_experts, in_experts, in_layers = 0, 0, 0
    for layer in decoder_layers(model):
        for name, weight in layer.named_parameters():
            if weight.ndim < 2:
                continue
            if _EXPERTS in f".{name}":
                in_experts += weight.numel()
                num_experts = len(weight)
            else:
                in_layers += weight.numel()
    latent = spec.latent
    expanded = None if latent is None else (spec.head_dim, latent.v_head_dim)
    per_layer = 0
    if latent is not None:
        per_layer = latent.kv_lora_rank * spec.num_q_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    linear = set(spec.linear_layers)
    return ModelSizes(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        kv_head=spec.kv_layout(1),
        layer_params=in_layers,
        windows=tuple(window for i, window in enumerate(spec.windows) if i not in linear),
        num_experts=num_experts,
        experts_per_token=(spec.experts_per_token or 0) if num_experts else 0,
        expert_params=in_experts // num_experts if num_experts else 0,
        expanded_head=expanded,
        expand_params=per_layer * spec.num_layers,
        max_absorbed_queries=None if latent is None else latent.max_absorbed_queries,
        states=spec.states,
    )
