"""What attention does in one step of the model: exchange, cache write, kernel, merge.

A step is built once, with its plan, and then called by every layer through the attention hook. Layers of a model may
differ in how far they see, so a step has rows for every *window* that the model's layers have; None is no window.

Letters: T new tokens of this rank, R decode rows of each pcp rank, S KV shards, C tp columns of the DCP group, H query
heads and K KV heads of this rank, G KV heads that its group stores, D head dim, V value dim, W values of a cached row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, PlannedAttention
from cpinfer.attention.context import ContextAttention, WindowContext, room_for_all, run_stored_heads
from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.attention.layer import AttentionLayer
from cpinfer.comm.axis import AxisComm
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.decode import DecodePlan
from cpinfer.layout.heads import GroupHeads
from cpinfer.layout.prefill import PrefillPlan
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.row_copies import copy_rows
from cpinfer.ops.states import State, count_sinks, merge_states

RowsByWindow = Mapping[int | None, AttentionRows]


class AttentionStep(Protocol):
    """One step of the model, as its attention layers see it. `num_tokens`: of the rows it runs, how many are real."""

    num_tokens: int

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[T, H, V]` attention output for q `[T, H, D]` and the new k, v `[T, K, D]` of this rank's tokens."""
        ...


class PrefillStep:
    """New tokens of prompts, split over the pcp axis: one gather of K and V per layer, then one backend call.

        own k, v [T, K, D], rounded as the cache rounds
          -> send buffer [part_len, K, W] -> all_gather over pcp -> [pcp * part_len, K, W]
          -> the tokens of this shard go to the cache
          -> every piece attends to the gathered buffer through its page table, and to its `context` if there is any

    Where a DCP group mixes KV heads the gather runs over the group instead, to `[C, pcp * part_len, K, W]`: the cache
    stores the heads of all columns, attention reads this rank's own.

    `absorbs`: queries attend to what is cached as it is, as decode has it, not expanded. (Of latents there are two ways
    to the same numbers, but not to the same bits.)

    The buffers belong to the step and serve all its layers. A rank without tokens runs one dummy token, whose attention
    output is zero and which nobody reads.
    """

    def __init__(
        self,
        plan: PrefillPlan,
        rows: RowsByWindow,
        backend: AttentionBackend,
        cache: PagedKVCache,
        comm: AxisComm,
        heads: GroupHeads,
        context: ContextAttention | None = None,
        window_contexts: Mapping[int | None, WindowContext] | None = None,
        *,
        absorbs: bool = False,
    ) -> None:
        self._absorbs = absorbs
        self.num_tokens = len(plan.positions)
        self._planned = {window: backend.plan(r) for window, r in rows.items()}
        self._cache = cache
        self._comm = comm
        self._heads = heads
        self._context = context
        self._window_contexts = dict(window_contexts or {})
        self._column, self._num_columns = comm.index // plan.split.pcp_size, comm.size // plan.split.pcp_size
        self._send_rows = cache.index(plan.send_rows)
        self._write_src = cache.index(plan.write_src)
        self._write_slots = cache.index(plan.write_slots)
        # Zeros: the padding travels too, and whatever a kernel may read must be finite.
        self._send = cache.new_rows(plan.split.part_len, heads.own.stop - heads.own.start)
        self._gathered = room_for_all(self._send, comm.size)

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = self.num_tokens
        gathered = self._gather(*self._cache.rounded(k[:T], v[:T]))
        self._write(layer.index, gathered)
        new_rows = gathered[self._column]
        if self._absorbs:
            out = layer.project(_output(layer, self._attend(layer, layer.absorb(q[:T]), new_rows), q.dtype))
        else:
            state = self._attend(layer, q[:T], new_rows)
            if self._context is not None and layer.window is None:
                state = merge_states([self._context.attend(layer, q[:T]), state])
            out = _output(layer, state, q.dtype)
        return out if len(q) == T else q.new_zeros(len(q), *out.shape[1:])

    def _attend(self, layer: AttentionLayer, q: Tensor, new_rows: Tensor) -> State:
        """To the new tokens, and to what stands before them."""
        context, states = self._window_contexts.get(layer.window), []
        parts = (
            [(self._planned[layer.window], slice(len(q)), new_rows)]
            if context is None
            else context.before(layer, new_rows)
        )
        for planned, queries, rows in parts:
            keys, values = self._cache.views(rows)
            keys, values = (keys, values) if self._absorbs else layer.expand(keys, values)
            states.append(layer.run(planned, q[queries], keys, values))
        if len(states) == 1:
            return states[0]
        outs, lses = zip(*states, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _gather(self, k: Tensor, v: Tensor) -> Tensor:
        """K and V of all ranks' tokens, `[C, pcp * part_len, K, W]`."""
        copies = zip(self._cache.parts(k, v), self._cache.views(self._send), strict=False)
        copy_rows(list(copies), None, self._send_rows)
        gathered = self._comm.all_gather(self._send, self._gathered)
        return gathered.view(self._num_columns, -1, *gathered.shape[2:])

    def _write(self, layer: int, gathered: Tensor) -> None:
        num_heads = gathered.shape[2]
        for i, column in enumerate(self._heads.columns):
            parts = self._cache.parts(*self._cache.views(gathered[column]))
            heads = slice(i * num_heads, (i + 1) * num_heads)
            self._cache.write(layer, self._write_slots, parts, self._write_src, heads)


class DecodeStep:
    """One new token for every running sequence: two collectives per layer over the DCP group, none at dcp=1.

        q, k, v of own rows [R, ...], k and v rounded as the cache rounds
          -> all_gather -> q [pcp * R, C * H, D], k and v [pcp * R, G, D]
          -> the owner of a token writes it
          -> all rows and heads attend to the keys of this shard: (out, lse) [pcp * R, C * H, V + 1]
          -> each rank gets the S partial states of its own rows and heads, merged in shard order

    With rows replicated (`exchange.replicates_rows`) all ranks have computed all rows, so nothing needs to be gathered
    first; the partial states come back by one all_gather.
    """

    def __init__(
        self,
        plan: DecodePlan,
        planned: Mapping[int | None, PlannedAttention],
        cache: PagedKVCache,
        exchange: StateExchange,
        heads: GroupHeads,
    ) -> None:
        self.num_tokens = int((plan.own >= 0).sum())
        self._planned = planned
        self._cache = cache
        self._exchange = exchange
        self._heads = heads
        # None: all of them, in order.
        is_whole = len(plan.write_src) == len(plan.gathered)
        self._write_src = None if is_whole else cache.index(plan.write_src)
        self._write_slots = cache.index(plan.write_slots)

    def write_by(self, src: Tensor, slots: Tensor) -> None:
        """From now on find which gathered rows are written, and where, in this memory, which its owner fills anew."""
        self._write_src, self._write_slots = src, slots

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_rows, new_kv = self._exchange.gather_qkv(layer.absorb(q), self._cache.parts(*self._cache.rounded(k, v)))
        self._cache.write(layer.index, self._write_slots, new_kv, self._write_src)
        planned = self._planned[layer.window]
        state = run_stored_heads(planned, q_rows, *self._cache.read(layer.index), self._heads, layer)
        out = _output(layer, self._exchange.return_partials(self._cache.with_faults(state)), q.dtype)
        return layer.project(out)


class IdleStep:
    """A decode step in which this rank's home has no sequence, but others wait for it. Its dummy row sees nothing."""

    num_tokens = 0

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.new_zeros(*q.shape[:-1], layer.v_dim(v))


def _output(layer: AttentionLayer, state: State, dtype: torch.dtype) -> Tensor:
    """What the layer makes of the merged state of its own rows."""
    out, lse = state
    return (out if layer.sinks is None else count_sinks(out, lse, layer.sinks)).to(dtype)
