"""What linear attention does in one step of the model: a convolution and the gated delta rule, each from a past.

A layer calls `convolve` and then `recur` of the step that runs. Between steps each sequence's state and last inputs lie
in the `StateStore` of one rank, which computes its row in decode steps.

Letters: T tokens of this rank, N their pieces, R decode rows, P pcp ranks, C channels, W width of the convolution, H
value heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cpinfer.comm.axis import AxisComm
from cpinfer.kv_cache.state_store import StateStore
from cpinfer.layout.states import FRESH, OPEN, StatePlan
from cpinfer.ops.delta_rule import (
    DeltaRule,
    DeltaTokens,
    PieceStates,
    advance,
    convolve_pieces,
    read_past,
    run_pieces,
    with_zero_row,
)


@dataclass(frozen=True)
class LinearLayer:
    """One layer of linear attention, with what its model computes by.

    `convolve`: its causal convolution and what follows it, `[1, C, n]` to the same, zeros before the first. `chunked`
    and `recurrent`: the rule over pieces, and over a token.
    """

    index: int
    convolve: Callable[[Tensor], Tensor]
    chunked: DeltaRule
    recurrent: DeltaRule


class LinearStep(Protocol):
    """One step of the model, as its layers of linear attention see it. `num_tokens`: how many of its rows are real."""

    num_tokens: int

    def convolve(self, layer: LinearLayer, x: Tensor) -> Tensor:
        """`[T, C]`: each token's inputs convolved with those before it in its sequence, x `[T, C]`."""
        ...

    def recur(self, layer: LinearLayer, tokens: DeltaTokens) -> Tensor:
        """`[T, H, V]`: what each token reads of its sequence's state, which goes on behind it."""
        ...


def own_precision(tokens: DeltaTokens) -> torch.autocast:
    """Under native mixed precision the rule keeps its own, as `flash-linear-attention`'s kernels do, and softmax
    attention here: states sum over the whole sequence, and pieces are to make what the whole does."""
    return torch.autocast(tokens.v.device.type, enabled=False)


class PrefillStates:
    """New tokens of prompts, split over the pcp axis: two gathers per layer, of a size that no length changes.

        x [T, C] -> the last inputs of each piece, behind them those of sequences kept here -> all_gather over pcp
                 -> before each piece its inputs, and behind each prompt those to keep
        the rule over pieces -> B, M of each, and states of sequences kept here -> all_gather over pcp
                 -> the state before each piece, whose read-out is added, and behind each prompt those to keep

    A rank without tokens takes part in both, and may have states to keep.
    """

    def __init__(self, plan: StatePlan, store: StateStore, comm: AxisComm) -> None:
        self.num_tokens = plan.num_tokens
        self._plan = plan
        self._store = store
        self._comm = comm
        num_tail = store.layout.num_tail
        ends = np.cumsum(plan.lens, dtype=np.int64)
        rows = ends[:, None] + np.arange(-num_tail, 0)
        own = rows >= (ends - np.asarray(plan.lens, dtype=np.int64))[:, None]
        self._sent_rows = self._index(np.where(own, rows, -1))
        self._tails = self._index(plan.tails)
        self._sent_inputs, self._sent_states = store.index(plan.sent_inputs), store.index(plan.sent_states)
        self._starts = [store.index([max(start, 0)]) for start in plan.starts]
        self._kept = [(store.index(c.slots), self._index(c.tail)) for c in plan.chains]

    def convolve(self, layer: LinearLayer, x: Tensor) -> Tensor:
        own, plan, store = x[: self.num_tokens], self._plan, self._store
        N = len(plan.lens)
        message = x.new_zeros(plan.num_tails, store.layout.num_tail, x.shape[-1])
        message[:N] = with_zero_row(own)[self._sent_rows]
        message[N : N + len(plan.sent_inputs)] = store.inputs(layer.index, self._sent_inputs).to(x.dtype)
        gathered = with_zero_row(self._comm.all_gather(message).reshape(-1, x.shape[-1]))
        for slots, tail in self._kept:
            store.write_inputs(layer.index, slots, gathered[tail])
        out = torch.zeros_like(x)
        if N:
            out[: self.num_tokens] = convolve_pieces(layer.convolve, own, plan.lens, gathered[self._tails])
        return out

    def recur(self, layer: LinearLayer, tokens: DeltaTokens) -> Tensor:
        T, plan, layout = self.num_tokens, self._plan, self._store.layout
        fresh = tokens.g.new_zeros(layout.num_v_heads, layout.k_dim, layout.v_dim)
        starts = [
            None if start == OPEN else fresh if start == FRESH else self._store.states(layer.index, slot)[0]
            for start, slot in zip(plan.starts, self._starts, strict=True)
        ]
        with own_precision(tokens):
            found = run_pieces(layer.chunked, tokens.first(T), plan.lens, starts)
            self._join(layer, found)
        out = torch.zeros_like(tokens.v)
        out[:T] = found.out
        return out

    def _join(self, layer: LinearLayer, found: PieceStates) -> None:
        """Add what pieces read of the past to their output, and keep the states behind prompts."""
        plan, store = self._plan, self._store
        states, maps = self._gather(layer, found)
        firsts = np.cumsum([0, *plan.lens])
        for chain, (slots, _) in zip(plan.chains, self._kept, strict=True):
            state = states[divmod(chain.start, plan.num_states)] if chain.start >= 0 else None
            reads = dict(chain.reads)
            for i, (end, through) in enumerate(chain.links):
                if (own := reads.get(i)) is not None:
                    read = found.reads[own]
                    assert read is not None and state is not None, "an open piece has a past"
                    found.out[firsts[own] : firsts[own + 1]] += read_past(read, state)
                own_map = maps[divmod(through, plan.num_maps)] if through >= 0 else None
                state = advance(state, states[divmod(end, plan.num_states)], own_map)
            if len(slots):
                assert state is not None, "a prompt has a token"
                store.write_states(layer.index, slots, state)

    def _gather(self, layer: LinearLayer, found: PieceStates) -> tuple[Tensor, Tensor]:
        """All ranks' states `[P, num_states, H, K, V]` and maps `[P, num_maps, H, K, K]`."""
        plan, layout = self._plan, self._store.layout
        message = found.out.new_zeros(plan.num_states * layout.state_values + plan.num_maps * layout.map_values)
        states, maps = self._parts(message.unsqueeze(0))
        kept = self._store.states(layer.index, self._sent_states)
        for place, state in zip(states[0], [*found.ends, *kept], strict=False):
            place.copy_(state)
        for place, own in zip(maps[0], [m for m in found.maps if m is not None], strict=False):
            place.copy_(own)
        return self._parts(self._comm.all_gather(message))

    def _parts(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        """States and maps of messages `[P, n]`, without a copy."""
        plan, layout, P = self._plan, self._store.layout, len(messages)
        states, maps = messages.split_with_sizes(
            [plan.num_states * layout.state_values, plan.num_maps * layout.map_values], dim=1
        )
        H, K = layout.num_v_heads, layout.k_dim
        return states.view(P, plan.num_states, H, K, layout.v_dim), maps.view(P, plan.num_maps, H, K, K)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self._store.device)


class DecodeStates:
    """One new token for each of this rank's sequences, whose states lie here: nothing travels. `slots`: of its rows."""

    def __init__(self, slots: Sequence[int], store: StateStore) -> None:
        self.num_tokens = len(slots)
        self._slots = store.index(slots)
        self._store = store

    def convolve(self, layer: LinearLayer, x: Tensor) -> Tensor:
        R, C = self.num_tokens, x.shape[-1]
        out = torch.zeros_like(x)
        if R:
            tails = self._store.inputs(layer.index, self._slots).to(x.dtype)
            inputs = torch.cat([tails, x[:R, None]], dim=1)
            width = inputs.shape[1]
            out[:R] = layer.convolve(inputs.view(1, -1, C).transpose(1, 2))[0].T[width - 1 :: width]
            self._store.write_inputs(layer.index, self._slots, inputs[:, 1:])
        return out

    def recur(self, layer: LinearLayer, tokens: DeltaTokens) -> Tensor:
        R = self.num_tokens
        out = torch.zeros_like(tokens.v)
        if R:
            q, k, v, g, beta = (x[:R, None] for x in (tokens.q, tokens.k, tokens.v, tokens.g, tokens.beta))
            with own_precision(tokens):
                read, after = layer.recurrent(
                    q, k, v, g=g, beta=beta, initial_state=self._store.states(layer.index, self._slots),
                    output_final_state=True, use_qk_l2norm_in_kernel=True,
                )  # fmt: skip
            out[:R] = read[:, 0]
            self._store.write_states(layer.index, self._slots, after)
        return out
