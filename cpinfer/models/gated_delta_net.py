"""Qwen3-Next's modules of linear attention (Gated DeltaNet): the forward that takes the place of their own.

Transformers' runs one sequence from a cache. Here the inputs of the convolution, and then what the gated delta rule
takes, go to the step, which knows whose tokens they are and what came before them. Projections, gates, the norm, and
the functions that convolve and run the rule (`flash-linear-attention`'s, where it is installed) stay the module's.
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
    return {"conv1d", "out_proj"} <= parts and not {"in_proj_qkvz", "in_proj_qkv"}.isdisjoint(parts)


def gated_delta_net(module: Any, hidden_states: Tensor, step: LinearStep, heads: LinearHeads) -> Tensor:
    """The forward of such a module, `[1, T, hidden]` to the same, by `step`; it has the `heads` of this rank."""
    T = hidden_states.shape[1]
    if "in_proj_qkvz" in module._modules:
        parts = module.in_proj_qkvz(hidden_states), module.in_proj_ba(hidden_states)
        q, k, v, z, b, a = module.fix_query_key_value_ordering(*parts)
        inputs = torch.cat([x.reshape(T, -1) for x in (q, k, v)], dim=-1)
    else:
        inputs = module.in_proj_qkv(hidden_states)[0]
        z, b, a = module.in_proj_z(hidden_states), module.in_proj_b(hidden_states), module.in_proj_a(hidden_states)
    layer = _layer(module, heads)
    q, k, v = step.convolve(layer, inputs).split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    # In float32: in half precision the decay could be no number.
    decay, bias = heads.of_values(local(module.A_log)), heads.of_values(local(module.dt_bias))
    g = -decay.float().exp() * softplus(a[0].float() + bias)
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


def _layer(module: Any, heads: LinearHeads) -> LinearLayer:
    # FSDP gives a module a class of its own, derived from the family's.
    modules = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    family: Any = next(m for m in modules if hasattr(m, "torch_chunk_gated_delta_rule"))
    convolve = partial(
        family.causal_conv1d_fn,
        weight=heads.of_channels(local(module.conv1d.weight)).squeeze(1),
        bias=None if module.conv1d.bias is None else heads.of_channels(local(module.conv1d.bias)),
        activation=module.activation,
    )
    return LinearLayer(
        module.layer_idx, convolve, family.torch_chunk_gated_delta_rule, family.torch_recurrent_gated_delta_rule
    )
