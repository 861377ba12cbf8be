"""The gated delta rule over pieces of sequences, also of those whose start state is not known yet.

    S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - k_t e^{g_t} S_{t-1}))        o_t = q_t S_t

It is linear in the values and the start state together. So one pass over a piece with the values widened by zeros,
`v' = [v | 0]`, from the state `[0 | I]`, gives what the piece would say without a past, `out`, what it reads of any
past, `read`, and what it makes of one: `S_end = M S_start + B`. States of all pieces then follow by products of small
matrices, in sequence order, and `out + read S_start` is what the rule gives over the whole sequence (Gated DeltaNet,
arXiv:2412.06464; the widening is this module's). A decay may be a vector, a number for each channel of a key (Kimi
Delta Attention, arXiv:2510.26692).

Letters: T packed tokens, H value heads, G key heads, K key dim, V value dim, C channels, W width of the convolution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

# Pieces are padded to multiples of this many tokens, as the rule over chunks of so many would do itself.
CHUNK_SIZE = 64


class DeltaRule(Protocol):
    """The rule over `[N, T, heads, dim]`, as Transformers has it: output `[N, T, H, V]` and end states `[N, H, K, V]`.

    g is `[N, T, H]`, or `[N, T, H, K]` where each channel of a key has its own, beta `[N, T, H]`; a token whose keys,
    values, g and beta are zero changes nothing.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class DeltaTokens:
    """What the rule takes of packed tokens: q and k `[T, G, K]`, v `[T, H, V]`, beta `[T, H]`.

    g, the log of the decay, is `[T, H]` or `[T, H, K]`; the state is in its dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def first(self, n: int) -> DeltaTokens:
        """The first n tokens."""
        return DeltaTokens(*(x[:n] for x in (self.q, self.k, self.v, self.g, self.beta)))


@dataclass
class PieceStates:
    """What became of pieces: `out [T, H, V]`, and for each its `ends` B `[H, K, V]`.

    Of a piece whose start is not known also `maps` M `[H, K, K]` and `reads [its tokens, H, K]`; None for others.
    """

    out: Tensor
    ends: list[Tensor]
    maps: list[Tensor | None]
    reads: list[Tensor | None]


def run_pieces(
    rule: DeltaRule, tokens: DeltaTokens, lens: Sequence[int], starts: Sequence[Tensor | None]
) -> PieceStates:
    """The rule over pieces of `lens` tokens, each at least one, packed one after another.

    `starts`: the state `[H, K, V]` before each, None where it is not known. Pieces of as many chunks are one call.
    """
    T, H, V = tokens.v.shape
    K, n = tokens.k.shape[-1], len(lens)
    # In the state's precision: what an unknown past adds comes on top before anything is rounded.
    result = PieceStates(tokens.g.new_zeros(T, H, V), [tokens.g] * n, [None] * n, [None] * n)
    groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for i, (length, start) in enumerate(zip(lens, starts, strict=True)):
        groups[start is None, -(-length // CHUNK_SIZE)].append(i)
    firsts = list(accumulate(lens, initial=0))
    padded = [with_zero_row(x) for x in (tokens.q, tokens.k, tokens.v, tokens.g, tokens.beta)]
    for (is_open, _), members in groups.items():
        longest = max(lens[i] for i in members)
        rows = torch.full((len(members), longest), T)  # the row behind the last is zero
        for row, i in zip(rows, members, strict=True):
            row[: lens[i]] = torch.arange(firsts[i], firsts[i] + lens[i])
        rows = rows.to(tokens.v.device)
        q, k, v, g, beta = (x[rows] for x in padded)
        if is_open:
            q, k, v = (x.to(g.dtype) for x in (q, k, v))
            v = torch.cat([v, v.new_zeros(*v.shape[:-1], K)], dim=-1)
            before = g.new_zeros(len(members), H, K, V + K)
            before[..., V:] = torch.eye(K, dtype=g.dtype, device=g.device)
        else:
            before = torch.stack([start for i in members if (start := starts[i]) is not None])
        out, after = rule(
            q, k, v, g=g, beta=beta, initial_state=before, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        for j, i in enumerate(members):
            own = out[j, : lens[i]]
            result.out[firsts[i] : firsts[i] + lens[i]] = own[..., :V]
            result.ends[i] = after[j, ..., :V]
            if is_open:
                result.reads[i], result.maps[i] = own[..., V:], after[j, ..., V:]
    return result


def advance(state: Tensor | None, end: Tensor, through: Tensor | None) -> Tensor:
    """`[H, K, V]` the state behind a piece of which B is `end` and M is `through`, from the one before it.

    Of a piece that began with its own start, M is None: its end is all there is to know.
    """
    if through is None:
        return end
    assert state is not None, "a piece with a map has a past"
    return torch.baddbmm(end, through, state)


def read_past(read: Tensor, start: Tensor) -> Tensor:
    """`[T, H, V]`: what tokens with `read [T, H, K]` get of the state before their piece, `start [H, K, V]`."""
    return torch.einsum("thk,hkv->thv", read, start)


def convolve_pieces(convolve: Callable[[Tensor], Tensor], x: Tensor, lens: Sequence[int], tails: Tensor) -> Tensor:
    """`[T, C]`: a causal convolution over packed pieces of `lens` tokens, x `[T, C]`.

    `convolve` takes `[1, C, n]` to the same; `tails [pieces, W - 1, C]` are the inputs before each piece.
    """
    num_tail = tails.shape[1]
    pieces = [part for tail, own in zip(tails, torch.split(x, list(lens)), strict=True) for part in (tail, own)]
    out = convolve(torch.cat(pieces).T.unsqueeze(0))[0].T
    # Behind each tail come its tokens; what is said at the tail's own places belongs to others.
    is_token = torch.cat([torch.arange(num_tail + n) >= num_tail for n in lens])
    return out[is_token.to(x.device)]


def with_zero_row(x: Tensor) -> Tensor:
    """`[T + 1, ...]`: x `[T, ...]`, and behind its last row one of zeros, which is row -1."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
