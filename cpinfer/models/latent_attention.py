"""DeepSeek's attention modules with a latent cache: the forward that takes the place of their own.

Transformers expands the latent to keys and values of every head before its attention function sees it. Here the latent
itself goes to the step, which caches it and decides where to expand. Projections, norms and RoPE stay the module's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from cpinfer.attention.layer import LatentLayer
from cpinfer.attention.steps import AttentionStep
from cpinfer.models.local_weights import local
from cpinfer.refusals import refuse


def is_latent_attention(module: Any) -> bool:
    """Whether the projections are the module's own: wrappers answer for what they wrap, which is met on its own."""
    return {"kv_a_proj_with_mqa", "kv_b_proj"} <= module._modules.keys()


def check_latent_projections(model: Any) -> None:
    """UnsupportedError where latents are projected by more than a weight.

    Attention to latents takes the weight of `kv_b_proj` apart, so what wraps that module would be passed over.
    """
    for name, module in model.named_modules():
        if is_latent_attention(module) and any(True for _ in module.kv_b_proj.children()):
            raise refuse("latent_adapter", f"{name}.kv_b_proj is a {type(module.kv_b_proj).__name__}")


def latent_attention(
    module: Any, hidden_states: Tensor, position_embeddings: Any, step: AttentionStep
) -> tuple[Tensor, None]:
    """The forward of a DeepSeek attention module, `[1, T, hidden]` to the same, attending by `step`.

    Queries `[1, H, T, N + R]`, the new latents `[T, 1, C + R]`. H is what this rank's projections give.
    """
    nope, rope, rank = module.qk_nope_head_dim, module.qk_rope_head_dim, module.kv_lora_rank
    T = hidden_states.shape[1]
    if module.q_lora_rank is None:
        q = module.q_proj(hidden_states)
    else:
        q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
    q_plain, q_rope = q.view(1, T, -1, nope + rope).transpose(1, 2).split([nope, rope], dim=-1)
    latent, k_rope = module.kv_a_proj_with_mqa(hidden_states).split([rank, rope], dim=-1)
    latent = module.kv_a_layernorm(latent)
    q_rope, k_rope = _rotate(module, q_rope, k_rope.unsqueeze(1), position_embeddings)

    queries = torch.cat([q_plain, q_rope], dim=-1)[0].transpose(0, 1)
    cached = torch.cat([latent, k_rope[:, 0]], dim=-1)[0].unsqueeze(1)
    w_k, w_v = (
        local(module.kv_b_proj.weight).view(-1, nope + module.v_head_dim, rank).split([nope, module.v_head_dim], dim=1)
    )
    layer = LatentLayer(module.layer_idx, module.scaling, w_k=w_k, w_v=w_v)
    out = step.attend(layer, queries, cached, cached[..., :rank])
    return module.o_proj(out.reshape(1, T, -1)), None


def _rotate(module: Any, q: Tensor, k: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """RoPE of q `[1, H, T, R]` and k `[1, 1, T, R]`, as the module's own family does it, or not at all."""
    if position_embeddings is None:
        return q, k
    # FSDP gives a module a class of its own, derived from the family's.
    modules = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    family: Any = next(m for m in modules if hasattr(m, "apply_rotary_emb") or hasattr(m, "apply_rotary_pos_emb"))
    if isinstance(position_embeddings, Tensor):  # V2: complex numbers
        rotated: tuple[Tensor, Tensor] = family.apply_rotary_emb(q, k, position_embeddings)
    elif getattr(module.config, "rope_interleave", False):
        rotated = family.apply_rotary_pos_emb_interleave(q, k, *position_embeddings)
    else:
        rotated = family.apply_rotary_pos_emb(q, k, *position_embeddings)
    return rotated
