"""Heads of linear attention under tensor parallelism: which of them a rank computes, and how AutoTP cuts between them.

    in_proj_qkvz, in_proj_ba     rows by key heads, each with its value heads: an even cut is one between heads
    in_proj_qkv                  rows of all q, of all k, of all v: in three projections, each of which is cut so
    conv1d, A_log, dt_bias       whole on every rank, which takes from them what its heads need
    out_proj                     columns by value heads, partial sums added

So it is where key heads divide over the ranks, and who shards follows. Elsewhere, and by Transformers' own plan, which
gathers what each projection gives, a rank computes all heads: right as well, and nothing is smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpinfer.errors import UserError
from cpinfer.layout.capacity import StateLayout
from cpinfer.models.gated_delta_net import LinearHeads, is_gated_delta_net, out_projection
from cpinfer.models.local_weights import shape_in_use


def heads_in_use(
    model: Any, layout: StateLayout, tp_size: int, tp_rank: int, *, gathered_by_fsdp: bool = False
) -> LinearHeads:
    """The heads that this rank's part of a model computes: those whose values its `out_proj` takes.

    UserError where layers do not agree, or where projections were cut through heads.
    """
    whole, cut = LinearHeads.of(layout), LinearHeads.of(layout, tp_size, tp_rank) if layout.divides(tp_size) else None
    found: LinearHeads | None = None
    for name, module in _linear_attention(model) if tp_size > 1 else ():
        projection, out = out_projection(module)
        columns = shape_in_use(out.weight, gathered_by_fsdp=gathered_by_fsdp)[1]
        heads = next((h for h in (whole, cut) if h is not None and h.counts["value_dim"] == columns), None)
        if heads is None or heads is not (found or heads):
            raise UserError(
                f"{name}.{projection} takes {columns} values on this rank; with {layout.num_v_heads} value heads of "
                f"{layout.v_dim} and {layout.num_k_heads} key heads over tp={tp_size} it should take all "
                f"{whole.counts['value_dim']}, or in every layer those of this rank's heads. Call expand_kv_heads "
                "before sharding, and check tp_size."
            )
        if heads is not whole and isinstance(getattr(module._modules.get("in_proj_qkv"), "weight", None), Tensor):
            raise UserError(
                f"{name}.in_proj_qkv was cut over tp={tp_size} where the rows of all heads end; rows of whole heads "
                "were wanted. Call expand_kv_heads before sharding."
            )
        found = heads
    return found or whole


def prepare_linear_attention(model: Any, layout: StateLayout, tp_size: int) -> None:
    """Change projections of a whole model, in place, so that an even cut over `tp_size` ranks is one between heads.

    Those that cannot be cut so are kept from it. The model computes what it computed before.
    """
    for _, module in _linear_attention(model):
        if not layout.divides(tp_size):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, WholeLinear(child))
        elif isinstance(module._modules.get("in_proj_qkv"), nn.Linear):
            ends = accumulate(layout.channels_by_kind, initial=0)
            module.in_proj_qkv = SplitLinear([_rows(module.in_proj_qkv, slice(*rows)) for rows in pairwise(ends)])
    for module in list(model.modules()):
        gate = module._modules.get("shared_expert_gate")
        if isinstance(gate, nn.Linear):  # its one output is for all that the shared expert adds
            module.shared_expert_gate = WholeLinear(gate)


class SplitLinear(nn.Module):
    """A projection as several, each with a run of its rows: `[..., C]` to their outputs, one behind the other."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class WholeLinear(nn.Module):
    """A linear layer, in a class that AutoTP does not know: it stays whole on every rank."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _linear_attention(model: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, module) for name, module in model.named_modules() if is_gated_delta_net(module))


def _rows(linear: nn.Linear, rows: slice) -> nn.Linear:
    part = nn.Linear(linear.in_features, rows.stop - rows.start, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=linear.bias.requires_grad)
    return part
