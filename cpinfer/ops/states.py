"""Attention states: what attention over part of the keys leaves behind, and how two parts become one.

A state is `(out, lse)`: the softmax-weighted mean of the values seen, and the log of the softmax's denominator, natural
log in float32. Merging is commutative and associative, with `(0, -inf)`, the state of no keys at all, as identity:

    lse = log(exp(lse_1) + exp(lse_2))          out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

(FlashInfer, arXiv:2501.01005, section 2.2.) On CUDA, packing and merging are one Triton kernel each, where Triton is
installed; what is written here is their definition, and what runs elsewhere.

Letters: N states, T tokens, H query heads, D head dim, S places, C tp columns, R rows of each pcp rank, W values of a
packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpinfer.ops.triton_modules import triton_module

State = tuple[Tensor, Tensor]


def merge_states(states: Sequence[State]) -> State:
    """One state from N, each `out [T, H, D]`, `lse [T, H]`; the sum runs in the order given, in float32 or wider.

    The order is part of the contract: shards merge in shard order, so every layout of the same shards rounds alike.
    Where all states are empty the result is `(0, -inf)`. A NaN in any state comes through: it is a fault upstream.
    """
    if len(states) == 1:
        return states[0]
    kernels = _kernels_for(*(x for state in states for x in state))
    if kernels is not None:
        merged = states[0]
        for i, state in enumerate(states[1:], 2):  # only the last is rounded
            merged = kernels.merge_pair(merged, state, states[0][0].dtype if i == len(states) else torch.float32)
        return merged
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

    These are gpt-oss's attention sinks. They belong after the last merge, on the row's owner, so that each counts once.
    Without keys the result is 0.
    """
    # By exp, whose bits on CPU do not depend on where in its input a number stands; those of torch.sigmoid do.
    share = 1 / (1 + torch.exp(sinks.to(lse.dtype) - lse))
    return out * share.unsqueeze(-1).to(out.dtype)


def pack_states(out: Tensor, lse: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """`[..., D + 4 / itemsize]` in `wire_dtype`: out, and behind it the bits of the float32 lse.

    Rounding lse to bfloat16 would cost 1e-2 of the merged output, so its bits travel unchanged.
    """
    _check_lse(lse)
    return torch.cat([out.to(wire_dtype), lse.unsqueeze(-1).contiguous().view(wire_dtype)], dim=-1)


def unpack_states(packed: Tensor, head_dim: int) -> State:
    """The inverse of `pack_states`: `out [..., D]` in float32 and `lse [...]`."""
    out, bits = packed[..., :head_dim], packed[..., head_dim:]
    return out.float(), bits.contiguous().view(torch.float32).squeeze(-1)


def packed_width(head_dim: int, wire_dtype: torch.dtype) -> int:
    """W: values of `wire_dtype` in a packed row."""
    return head_dim + torch.float32.itemsize // wire_dtype.itemsize


def pack_by_place(out: Tensor, lse: Tensor, wire_dtype: torch.dtype, pcp_size: int, columns: int) -> Tensor:
    """`[S, R, H, W]`: packed states of each place's own rows and heads; places run pcp fastest.

    `out [pcp * R, C * H, D]`, `lse [pcp * R, C * H]`: rows pcp rank by pcp rank, heads column by column.
    """
    _check_lse(lse)
    kernels = _kernels_for(out, lse)
    if kernels is not None and packed_width(out.shape[-1], wire_dtype) * wire_dtype.itemsize % 4 == 0:
        packed: Tensor = kernels.pack_by_place(out, lse, wire_dtype, pcp_size, columns)
        return packed
    return by_place(pack_states(out, lse, wire_dtype), pcp_size, columns)


def by_place(x: Tensor, pcp_size: int, columns: int) -> Tensor:
    """`[pcp * R, C * H, ...]` to `[S, R, H, ...]`: what each place's own rows and heads got here."""
    num_rows, num_heads, *rest = x.shape
    x = x.reshape(pcp_size, num_rows // pcp_size, columns, num_heads // columns, *rest)
    return x.movedim(2, 0).flatten(0, 1).contiguous()


def merge_packed(packed: Tensor, head_dim: int) -> State:
    """`out [..., D]` and `lse [...]`, float32, of N packed states `[N, ..., W]`, merged in their order."""
    kernels = _kernels_for(packed)
    if kernels is not None and packed.shape[-1] * packed.dtype.itemsize % 4 == 0:
        state: State = kernels.merge_packed(packed.contiguous(), head_dim)
        return state
    return merge_states([unpack_states(part, head_dim) for part in packed])


def _check_lse(lse: Tensor) -> None:
    if lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype}, float32 was wanted")


def _kernels_for(*tensors: Tensor) -> Any:
    """The kernels, where these tensors are on CUDA and of a dtype that they know; else None."""
    if not all(x.is_cuda and x.dtype != torch.float64 for x in tensors):
        return None
    return triton_module("state_kernels")
