"""Attention of one row: its queries against keys and values that lie in plain tensors.

`dense_attention` is the definition, in a handful of lines that work on any device. `flash_attention_cpu` is the same on
torch's flash kernel for CPU, with that kernel's traps guarded. Both take query head h to KV head `h // (H / K)`, and
under `causal` align the mask to the *end*: the last query sees every key.

Letters: T queries, S keys, H query heads, K KV heads, D head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cpinfer.ops.states import State, merge_states


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> State:
    """`out [T, H, V]` in q's dtype and `lse [T, H]` in float32 (float64 for float64 inputs).

    q `[T, H, D]`, k `[S, K, D]`, v `[S, K, V]`. Computed in at least float32. Without keys: `(0, -inf)`. Under
    `causal` a query that precedes every key (T > S) sees none.
    """
    T, H, _ = q.shape
    S, K, V = v.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).reshape(T, K, H // K, q.shape[-1])
    scores = torch.einsum("tkgd,skd->tkgs", grouped, k.to(wide)) * scale
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1) if S else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    out = torch.einsum("tkgs,skv->tkgv", weights, v.to(wide))
    return out.reshape(T, H, V).to(q.dtype), lse.reshape(T, H)


def flash_attention_cpu(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> State:
    """`dense_attention` by torch's flash kernel; k and v may be strided views, so a run of cache slots needs no copy.

    ValueError when H is no multiple of K (the kernel would accept it), or when a causal row has more queries than keys.
    """
    (T, H, _), (S, K) = q.shape, k.shape[:2]
    if H % K:
        raise ValueError(f"{H} query heads do not divide over {K} KV heads")
    # The kernel kills the process (SIGFPE) on empty input.
    if T == 0 or S == 0:
        return q.new_zeros(T, H, v.shape[-1]), _empty_lse(q)
    if not causal or T == 1:
        return _flash(q, k, v, scale, causal=False)
    if T > S:
        raise ValueError(f"a causal row of {T} queries over {S} keys: the first queries would see nothing")
    if T == S:
        return _flash(q, k, v, scale, causal=True)
    # The kernel aligns its causal mask to the first key, so what every query sees goes in a call of its own.
    context = _flash(q, k[: S - T], v[: S - T], scale, causal=False)
    square = _flash(q, k[S - T :], v[S - T :], scale, causal=True)
    return merge_states([context, square])


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> State:
    T, H, D = q.shape
    K, V = v.shape[1:]
    if V < D:  # equal head dims are all it takes; zero columns change nothing
        v = F.pad(v, (0, D - V))
    elif V > D:
        q, k = F.pad(q, (0, V - D)), F.pad(k, (0, V - D))
    # One query: its heads that share a KV head become the query rows of that head, one pass over the keys for all.
    single = T == 1
    heads_first = q.view(K, H // K, -1) if single and q.is_contiguous() else q.transpose(0, 1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        heads_first[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], 0.0, causal, attn_mask=None, scale=scale
    )
    if heads_first.shape[0] != H or single:
        return out.reshape(1, H, -1)[..., :V], lse.reshape(1, H)
    return out[0].transpose(0, 1)[..., :V], lse[0].transpose(0, 1)


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
