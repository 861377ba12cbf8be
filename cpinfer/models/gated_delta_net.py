"""Qwen3-Next's modules of linear attention (Gated DeltaNet): the forward that takes the place of their own.

Transformers' runs one sequence from a cache. Here the inputs of the convolution, and then what the gated delta rule
takes, go to the step, which knows whose tokens they are and what came before them. Projections, gates, the norm, and
the functions that convolve and run the rule (`flash-linear-attention`'s, where it is installed) stay the module's.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cpinfer.attention.linear_attention import LinearLayer, LinearStep
from cpinfer.models.local_weights import local
from cpinfer.ops.delta_rule import DeltaTokens


def is_gated_delta_net(module: Any) -> bool:
    """Whether the parts of one are the module's own: wrappers answer for what they wrap, which is met on its own."""
    parts = module._modules.keys()
    return {"conv1d", "out_proj"} <= parts and not {"in_proj_qkvz", "in_proj_qkv"}.isdisjoint(parts)


def gated_delta_net(module: Any, hidden_states: Tensor, step: LinearStep) -> Tensor:
    """The forward of such a module, `[1, T, hidden]` to the same, by `step`."""
    T = hidden_states.shape[1]
    if "in_proj_qkvz" in module._modules:
        parts = module.in_proj_qkvz(hidden_states), module.in_proj_ba(hidden_states)
        q, k, v, z, b, a = module.fix_query_key_value_ordering(*parts)
        inputs = torch.cat([x.reshape(T, -1) for x in (q, k, v)], dim=-1)
    else:
        inputs = module.in_proj_qkv(hidden_states)[0]
        z, b, a = module.in_proj_z(hidden_states), module.in_proj_b(hidden_states), module.in_proj_a(hidden_states)
    layer = _layer(module)
    q, k, v = step.convolve(layer, inputs).split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    # In float32: in half precision the decay could be no number.
    g = -local(module.A_log).float().exp() * softplus(a[0].float() + local(module.dt_bias))
    out = step.recur(
        layer,
        DeltaTokens(
            q.reshape(T, -1, module.head_k_dim),
            k.reshape(T, -1, module.head_k_dim),
            v.reshape(T, -1, module.head_v_dim),
            g,
            b[0].sigmoid(),
        ),
    )
    out = module.norm(out.reshape(-1, module.head_v_dim), z.reshape(-1, module.head_v_dim))
    result: Tensor = module.out_proj(out.reshape(1, T, -1))
    return result


def _layer(module: Any) -> LinearLayer:
    # FSDP gives a module a class of its own, derived from the family's.
    modules = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    family: Any = next(m for m in modules if hasattr(m, "torch_chunk_gated_delta_rule"))
    convolve = partial(
        family.causal_conv1d_fn,
        weight=local(module.conv1d.weight).squeeze(1),
        bias=None if module.conv1d.bias is None else local(module.conv1d.bias),
        activation=module.activation,
    )
    return LinearLayer(
        module.layer_idx, convolve, family.torch_chunk_gated_delta_rule, family.torch_recurrent_gated_delta_rule
    )
