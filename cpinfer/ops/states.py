"""Attention states: what attention over part of the keys leaves behind, and how two parts become one.

A state is `(out, lse)`: the softmax-weighted mean of the values seen, and the log of the softmax's denominator, natural
log in float32. Merging is commutative and associative, with `(0, -inf)`, the state of no keys at all, as identity:

    lse = log(exp(lse_1) + exp(lse_2))          out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

(FlashInfer, arXiv:2501.01005, section 2.2.) Letters: N states, T tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def merge_states(states: Sequence[State]) -> State:
    """One state from N, each `out [T, H, D]`, `lse [T, H]`; the sum runs in the order given, in float32 or wider.

    The order is part of the contract: shards merge in shard order, so every layout of the same shards rounds alike.
    Where all states are empty the result is `(0, -inf)`. A NaN in any state comes through: it is a fault upstream.
    """
    if len(states) == 1:
        return states[0]
    lses = torch.stack([lse for _, lse in states])
    peak = lses.amax(dim=0)
    # exp(-inf - -inf) would be NaN where every state is empty; any finite stand-in gives the right zeros.
    weights = torch.exp(lses - torch.where(peak == -torch.inf, 0.0, peak))
    total = weights[0]
    for w in weights[1:]:
        total = total + w
    shares = weights / torch.where(total == 0, 1.0, total)
    out = shares[0, ..., None] * states[0][0]
    for share, (part, _) in zip(shares[1:], states[1:], strict=True):
        out = out + share[..., None] * part
    lse = torch.where(total == 0, -torch.inf, torch.log(total) + peak)
    return out.to(states[0][0].dtype), lse


def count_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """`out [T, H, D]` after one more key per head, with logit `sinks [H]` and value 0: the state `(0, sink)` merged in.

    It belongs after the last merge, on the row's owner, so that each sink counts once. Without keys the result is 0.
    """
    return out * torch.sigmoid(lse - sinks.to(lse.dtype)).unsqueeze(-1).to(out.dtype)


def pack_states(out: Tensor, lse: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """`[..., D + 4 / itemsize]` in `wire_dtype`: out, and behind it the bits of the float32 lse.

    Rounding lse to bfloat16 would cost 1e-2 of the merged output, so its bits travel unchanged.
    """
    if lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype}, float32 was wanted")
    return torch.cat([out.to(wire_dtype), lse.unsqueeze(-1).contiguous().view(wire_dtype)], dim=-1)


def unpack_states(packed: Tensor, head_dim: int) -> State:
    """The inverse of `pack_states`: `out [..., D]` in float32 and `lse [...]`."""
    out, bits = packed[..., :head_dim], packed[..., head_dim:]
    return out.float(), bits.contiguous().view(torch.float32).squeeze(-1)
