"""Attention of one row: its queries against keys and values that lie in plain tensors.

`dense_attention` is the definition, in a handful of lines that work on any device. `flash_attention_cpu` is the same on
torch's flash kernel for CPU, with that kernel's traps guarded. Both take query head h to KV head `h // (H / K)`, and
under `causal` align the mask to the *end*: the last query sees every key. A `window` of w, under `causal` only, leaves
each query the last w keys that it would see; a `soft_cap` of c turns a logit x into `c * tanh(x / c)`.

    T=3, S=5, causal       x x x . .        window=2       . x x . .
                           x x x x .                       . . x x .
                           x x x x x                       . . . x x

Letters: T queries, S keys, H query heads, K KV heads, D head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cpinfer.ops.states import State, merge_states

# Scores that one tile of queries may have at once, all heads: 64 MiB of float32.
DENSE_TILE_SCORES = 2**24
# Queries of a windowed row that share one kernel call. With fewer there are more calls, with more there are more masked
# keys; as many as the window is wide, a call computes at most twice what is seen.
MIN_WINDOW_TILE, MAX_WINDOW_TILE = 64, 512
# With more queries the kernel is as fast head by head.
MAX_FOLDED_QUERIES = 8


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
) -> State:
    """`out [T, H, V]` in q's dtype and `lse [T, H]` in float32 (float64 for float64 inputs).

    q `[T, H, D]`, k `[S, K, D]`, v `[S, K, V]`. Computed in at least float32, a tile of queries at a time. Without
    keys: `(0, -inf)`. Under `causal` a query that precedes every key (T > S) sees none.
    """
    T, H, _ = q.shape
    tile = max(1, DENSE_TILE_SCORES // max(1, len(k) * H))
    if tile >= T:
        return _dense_tile(q, k, v, 0, T, scale, causal, window, soft_cap)
    tiles = [_dense_tile(q[at : at + tile], k, v, at, T, scale, causal, window, soft_cap) for at in range(0, T, tile)]
    outs, lses = zip(*tiles, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _dense_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    num_queries: int,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
) -> State:
    """Queries from the `first` on, of `num_queries` in the row."""
    hidden = hidden_keys(len(q), len(k), len(k) - num_queries + first, window, q.device) if causal else None
    return _attend(q, k, v, hidden, scale, soft_cap)


def dense_single_queries(
    q: Tensor, k: Tensor, v: Tensor, num_keys: Tensor, *, scale: float, soft_cap: float | None = None
) -> State:
    """`dense_attention` of many rows of one query: row b sees the first `num_keys[b]` of its keys, at least one.

    q `[B, H, D]`, k `[B, S, K, D]`, v `[B, S, K, V]` with finite numbers everywhere; `out [B, H, V]`, `lse [B, H]`.
    """
    hidden = torch.arange(k.shape[1], device=q.device) >= num_keys[:, None]
    return _attend(q, k, v, hidden, scale, soft_cap)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, soft_cap: float | None) -> State:
    """Of q `[T, H, D]` to k `[S, K, D]`, v `[S, K, V]`, or to k and v of each query, `[T, S, ...]`; `hidden [T, S]`."""
    T, H, D = q.shape
    S, K, V = v.shape[-3:]
    own = "t" if k.dim() == 4 else ""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).reshape(T, K, H // K, D)
    scores = torch.einsum(f"tkgd,{own}skd->tkgs", grouped, k.to(wide)) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1) if S else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    out = torch.einsum(f"tkgs,{own}skv->tkgv", weights, v.to(wide))
    return out.reshape(T, H, V).to(q.dtype), lse.reshape(T, H)


def hidden_keys(num_queries: int, num_keys: int, at: int, window: int | None, device: torch.device) -> Tensor:
    """`[T, S]` bool, True where a causal query does not see a key; query i stands at key `at + i`.

    >>> hidden_keys(2, 4, 2, 2, torch.device("cpu")).int().tolist()
    [[1, 0, 0, 1], [1, 1, 0, 0]]
    """
    place = torch.arange(at, at + num_queries, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    hidden = key > place
    return hidden if window is None else hidden | (key <= place - window)


def flash_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> State:
    """`dense_attention` by torch's flash kernel; k and v may be strided views, so a run of cache slots needs no copy.

    ValueError when H is no multiple of K (the kernel would accept it), or when a causal row has more queries than keys.
    """
    (T, H, _), (S, K) = q.shape, k.shape[:2]
    if H % K:
        raise ValueError(f"{H} query heads do not divide over {K} KV heads")
    # The kernel kills the process (SIGFPE) on empty input.
    if T == 0 or S == 0:
        return q.new_zeros(T, H, v.shape[-1]), _empty_lse(q)
    if not causal:
        return _flash(q, k, v, scale)
    if T > S:
        raise ValueError(f"a causal row of {T} queries over {S} keys: the first queries would see nothing")
    if window is not None and window < S:
        return _flash_in_window(q, k, v, scale, window)
    if T == 1:
        return _flash(q, k, v, scale)
    if T == S:
        return _flash(q, k, v, scale, causal=True)
    # The kernel aligns its causal mask to the first key, so what every query sees goes in a call of its own.
    context = _flash(q, k[: S - T], v[: S - T], scale)
    square = _flash(q, k[S - T :], v[S - T :], scale, causal=True)
    return merge_states([context, square])


def flash_single_queries_cpu(q: Tensor, k: Tensor, v: Tensor, num_keys: Tensor, *, scale: float) -> State:
    """Many rows of one query in one call of the kernel: row b sees the first `num_keys[b]` of its keys, at least one.

    q `[B, H, D]`, k `[B, S, K, D]`, v `[B, S, K, V]` with finite numbers everywhere; `out [B, H, V]`, `lse [B, H]`.
    """
    (B, H, _), (S, K, V) = q.shape, v.shape[1:]
    hidden = torch.arange(S, device=q.device) >= num_keys[:, None]
    mask = torch.zeros(B, 1, 1, S, dtype=q.dtype, device=q.device)
    mask.masked_fill_(hidden[:, None, None, :], -torch.inf)
    q, k, v = _equal_head_dims(q, k, v)
    # The heads that share a KV head are the query rows of that head.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B, K, H // K, -1), k.transpose(1, 2), v.transpose(1, 2), 0.0, False, attn_mask=mask, scale=scale
    )
    return out.reshape(B, H, -1)[..., :V], lse.reshape(B, H)


def _flash_in_window(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> State:
    """The kernel knows no windows: tiles of queries, each over the keys it sees at all, under a mask."""
    T, S = len(q), len(k)
    tile = min(max(window, MIN_WINDOW_TILE), MAX_WINDOW_TILE)
    states = []
    for first in range(0, T, tile):
        last = min(first + tile, T)
        lo, hi = max(0, S - T + first - window + 1), S - T + last
        hidden = hidden_keys(last - first, hi - lo, S - T + first - lo, window, q.device)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        states.append(_flash(q[first:last], k[lo:hi], v[lo:hi], scale, mask=mask))
    outs, lses = zip(*states, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None) -> State:
    T, H, _ = q.shape
    K, V = v.shape[1:]
    q, k, v = _equal_head_dims(q, k, v)
    # Few queries: heads that share a KV head become query rows of that head, one pass over the keys for all of them.
    # (One query may come under a mask as well: it hides no key that is passed here.)
    is_folded = T == 1 or (T <= MAX_FOLDED_QUERIES and not causal and mask is None)
    if T == 1:
        heads_first = q.reshape(K, H // K, -1)
    elif is_folded:
        heads_first = q.view(T, K, H // K, -1).transpose(0, 1).flatten(1, 2)
    else:
        heads_first = q.transpose(0, 1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        heads_first[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        0.0,
        causal,
        attn_mask=None if is_folded else mask,
        scale=scale,
    )
    if T == 1:
        return out.reshape(1, H, -1)[..., :V], lse.reshape(1, H)
    if is_folded:
        out, lse = (x.view(K, T, H // K, -1).transpose(0, 1).reshape(T, H, -1) for x in (out, lse))
        return out[..., :V], lse[..., 0]
    return out[0].transpose(0, 1)[..., :V], lse[0].transpose(0, 1)


def _equal_head_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel takes nothing else; zero columns change nothing, and columns of output that are too many are cut."""
    D, V = q.shape[-1], v.shape[-1]
    if V < D:
        return q, k, F.pad(v, (0, D - V))
    if V > D:
        return F.pad(q, (0, V - D)), F.pad(k, (0, V - D)), v
    return q, k, v


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
