"""Modules of linear attention by the delta rule: the forward that takes the place of their own.

    Qwen3-Next, Qwen3.5    Gated DeltaNet: fused projections, a decay for each head
    OLMo Hybrid            the same of single projections; beta may be up to 2, for eigenvalues below zero
    Kimi Linear            Kimi Delta Attention: single projections, a decay for each channel of a key

Transformers' runs one sequence from a cache. Here the inputs of the convolution, and then what the rule takes, go to
the step, which knows whose tokens they are and what came before them. Projections, gates, the norm, and the functions
that convolve and run the rule (`flash-linear-attention`'s, where it is installed) stay the module's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cpinfer.attention.linear_attention import LinearLayer, LinearStep
from cpinfer.layout.capacity import StateLayout
from cpinfer.models.local_weights import local
from cpinfer.ops.delta_rule import DeltaTokens

# What the rule is called in a family's file: over pieces, and over a token.
_RULES = (
    ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
)


@dataclass(frozen=True)
class LinearHeads:
    """What one rank computes of layers of linear attention.

    `own`: their sizes over the heads of this rank. `channels`: where the q, k and v of these lie among all channels of
    the convolution, `v_heads`: they themselves among all value heads.
    """

    own: StateLayout
    channels: tuple[slice, ...]
    v_heads: slice

    @classmethod
    def of(cls, layout: StateLayout, tp_size: int = 1, tp_rank: int = 0) -> LinearHeads:
        """Those of a rank where layers of `layout` are cut over `tp_size`; by default all of them."""
        own = layout.over(tp_size)
        ends = list(accumulate(layout.channels_by_kind, initial=0))
        widths = own.channels_by_kind
        starts = [end + tp_rank * width for end, width in zip(ends, widths, strict=False)]
        return cls(
            own,
            tuple(slice(start, start + width) for start, width in zip(starts, widths, strict=True)),
            slice(tp_rank * own.num_v_heads, (tp_rank + 1) * own.num_v_heads),
        )

    def of_channels(self, weight: Tensor) -> Tensor:
        """`[own channels, ...]` of a weight with a row for each channel, all of them or those of this rank."""
        if len(weight) == self.own.num_channels:
            return weight
        return torch.cat([weight[part] for part in self.channels])

    def of_values(self, weight: Tensor) -> Tensor:
        """`[own value heads]` of a weight with a number for each value head, all of them or those of this rank."""
        return weight if len(weight) == self.own.num_v_heads else weight[self.v_heads]

    @property
    def counts(self) -> dict[str, int]:
        """What a module says of its heads, as it is to say it on this rank."""
        key_dim, _, value_dim = self.own.channels_by_kind
        return {
            "num_k_heads": self.own.num_k_heads,
            "num_v_heads": self.own.num_v_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
        }


def is_gated_delta_net(module: Any) -> bool:
    """Whether the parts of one are the module's own: wrappers answer for what they wrap, which is met on its own."""
    parts = module._modules.keys()
    return "conv1d" in parts and not parts.isdisjoint(("in_proj_qkvz", "in_proj_qkv", "q_proj"))


def out_projection(module: Any) -> tuple[str, Any]:
    """The name of the projection of values to hidden states in such a module, and the projection."""
    name = "out_proj" if "out_proj" in module._modules else "o_proj"
    return name, module._modules[name]


def gated_delta_net(module: Any, hidden_states: Tensor, step: LinearStep, heads: LinearHeads) -> Tensor:
    """The forward of such a module, `[1, T, hidden]` to the same, by `step`; it has the `heads` of this rank."""
    T, own, sizes = hidden_states.shape[1], module._modules, heads.own
    inputs, gates, g, beta = _projected(module, hidden_states, heads)
    layer = _layer(module, heads)
    q, k, v = step.convolve(layer, inputs).split(sizes.channels_by_kind, dim=-1)
    by_head = (q.reshape(T, -1, sizes.k_dim), k.reshape(T, -1, sizes.k_dim), v.reshape(T, -1, sizes.v_dim))
    out = step.recur(layer, DeltaTokens(*by_head, g, beta))
    norm = module.norm if "norm" in own else module.o_norm
    out = norm(out.reshape(-1, sizes.v_dim), gates.reshape(-1, sizes.v_dim))
    result: Tensor = out_projection(module)[1](out.reshape(1, T, -1))
    return result


def _projected(module: Any, x: Tensor, heads: LinearHeads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the convolution `[T, C]`, gates of the output, and g and beta as `DeltaTokens` has them."""
    own, T = module._modules, x.shape[1]
    if "in_proj_qkvz" in own:
        parts = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
        *qkv, gates, b, a = parts
        inputs = torch.cat([part.reshape(T, -1) for part in qkv], dim=-1)
    elif "in_proj_qkv" in own:
        inputs = module.in_proj_qkv(x)[0]
        gates, b, a = module.in_proj_z(x), module.in_proj_b(x), module.in_proj_a(x)
    else:
        inputs = torch.cat([module.q_proj(x), module.k_proj(x), module.v_proj(x)], dim=-1)[0]
        if "forget_gate" in own:
            gates, b = module.g_b_proj(module.g_a_proj(x)), module.b_proj(x)
            return inputs, gates, module.forget_gate(x)[0], b[0].sigmoid()
        gates, b, a = module.g_proj(x), module.b_proj(x), module.a_proj(x)
    # In float32: in half precision the decay could be no number.
    decay, bias = heads.of_values(local(module.A_log)), heads.of_values(local(module.dt_bias))
    g = -decay.float().exp() * softplus(a[0].float() + bias)
    beta = b[0].sigmoid()
    return inputs, gates, g, beta * 2 if vars(module).get("allow_neg_eigval", False) else beta


def _layer(module: Any, heads: LinearHeads) -> LinearLayer:
    # FSDP gives a module a class of its own, derived from the family's.
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    family, names = next((file, names) for file in files for names in _RULES if hasattr(file, names[0]))
    convolve = partial(
        family.causal_conv1d_fn,
        weight=heads.of_channels(local(module.conv1d.weight)).squeeze(1),
        bias=None if module.conv1d.bias is None else heads.of_channels(local(module.conv1d.bias)),
        activation=module.activation,
    )
    chunked, recurrent = (getattr(family, name) for name in names)
    return LinearLayer(module.layer_idx, convolve, chunked, recurrent)
