"""K/V heads copied so that any tensor parallelism can deal them evenly to more ranks than there are heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cpinfer.models.linear_cuts import prepare_linear_attention
from cpinfer.models.spec import NUM_KV_HEADS_BEFORE_EXPANSION, ModelSpec


def expand_kv_heads(model: Any, tp_size: int) -> None:
    """Repeat the K and V projections of a model by whole heads, in place, until `tp_size` ranks can have one each.

    Call it before the framework shards the weights. Expanded head j is a copy of head `j // rep`, so a rank's query
    heads find their own KV head beside them; the model computes what it computed before. Nothing is repeated when
    `tp_size` is not above the number of KV heads. Where layers of linear attention would be cut through heads, their
    projections become others too (`prepare_linear_attention`).

    Args:
        model: a Hugging Face causal LM, whole; its config is changed with it.
        tp_size: ranks that will share its weights.

    Raises:
        ValueError: when the heads cannot be shared evenly.
    """
    spec = ModelSpec.from_config(model.config.to_dict())
    if spec.states is not None and tp_size > 1:
        prepare_linear_attention(model, spec.states, tp_size)
    if spec.latent is not None:
        return  # its projection is whole on every rank
    if spec.traits.has_fused_qkv:
        model.config.num_key_value_heads = spec.num_kv_heads * spec.heads(tp_size).rep
        return
    # Heads that are copies already count: a second call finds enough of them.
    have = model.config.num_key_value_heads
    rep = spec.heads(tp_size).rep * spec.num_kv_heads // have
    if rep <= 1:
        return
    for module in model.modules():
        for name in ("k_proj", "v_proj"):
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                setattr(module, name, _repeat_heads(projection, spec.head_dim, rep))
                module.num_key_value_groups = spec.num_q_heads // (have * rep)
    setattr(model.config, NUM_KV_HEADS_BEFORE_EXPANSION, spec.num_kv_heads)
    model.config.num_key_value_heads = have * rep


@torch.no_grad()
def _repeat_heads(linear: nn.Linear, head_dim: int, rep: int) -> nn.Linear:
    def repeat(x: torch.Tensor) -> nn.Parameter:
        heads = x.view(-1, head_dim, *x.shape[1:]).repeat_interleave(rep, dim=0)
        return nn.Parameter(heads.reshape(-1, *x.shape[1:]), requires_grad=x.requires_grad)

    wide = nn.Linear(linear.in_features, linear.out_features * rep, bias=linear.bias is not None, device="meta")
    wide.weight = repeat(linear.weight)
    if linear.bias is not None:
        wide.bias = repeat(linear.bias)
    return wide
