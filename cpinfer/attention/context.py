"""Attention to what earlier steps cached of the prompts of a prefill step: chunks, cached prefixes, further turns.

No ring attention: what a ring would pass on in steps, queries or KV, is gathered at once.

Letters: T new tokens of this rank, H query heads and K KV heads of this rank, W values of a cached row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, PlannedAttention
from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.attention.layer import AttentionLayer
from cpinfer.comm.axis import AxisComm
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.context import KVExchange, QueryExchange, WindowExchange
from cpinfer.layout.heads import GroupHeads
from cpinfer.ops.row_copies import copy_rows
from cpinfer.ops.states import State, merge_states


class ContextAttention(Protocol):
    """Attention of new tokens to what is cached of their prompts, for layers that see all of it."""

    def attend(self, layer: AttentionLayer, q: Tensor) -> State:
        """`out [T, H, V]`, `lse [T, H]` for q `[T, H, D]`; T may be 0. Collective over the exchange axis."""
        ...


class QueryContext:
    """The queries travel to the cached KV: gather q, attend to this shard, and return the partial states."""

    def __init__(
        self,
        plan: QueryExchange,
        backend: AttentionBackend,
        cache: PagedKVCache,
        exchange: StateExchange,
        heads: GroupHeads,
    ) -> None:
        self._planned = backend.plan(plan.rows.over(cache.layout))
        self._cache = cache
        self._exchange = exchange
        self._heads = heads
        self._part_len = plan.part_len

    def attend(self, layer: AttentionLayer, q: Tensor) -> State:
        q = layer.absorb(q)
        T, H, D = q.shape
        padded = q if self._part_len == T else torch.cat([q, q.new_zeros(self._part_len - T, H, D)])
        gathered = self._exchange.gather_rows(padded)
        state = run_stored_heads(self._planned, gathered, *self._cache.read(layer.index), self._heads, layer)
        out, lse = self._exchange.return_partials(self._cache.with_faults(state))
        return layer.project(out[:T]), lse[:T]


class KVContext:
    """The cached KV travels to the queries: window after window is gathered, attended to, and merged."""

    def __init__(
        self, plan: KVExchange, backend: AttentionBackend, cache: PagedKVCache, comm: AxisComm, heads: GroupHeads
    ) -> None:
        self._windows = [(backend.plan(w.rows), w.length, cache.index(w.slots)) for w in plan.windows]
        self._gather = CachedRowsGather(cache, comm, heads, max(w.length for w in plan.windows))
        self._cache = cache

    def attend(self, layer: AttentionLayer, q: Tensor) -> State:
        states = []
        for planned, length, slots in self._windows:
            keys, values = layer.expand(*self._cache.views(self._gather(layer.index, slots, length)))
            states.append(layer.run(planned, q, keys, values))
        return merge_states(states)


class WindowContext:
    """The end of every context, for layers that see no more of it: it goes in front of the new tokens.

    Of some prompts after others, where `plans` are several.
    """

    def __init__(
        self,
        plans: Sequence[WindowExchange],
        backend: AttentionBackend,
        cache: PagedKVCache,
        comm: AxisComm,
        heads: GroupHeads,
    ) -> None:
        self._parts = [(backend.plan(p.rows), p.queries, cache.index(p.slots), p.length) for p in plans]
        self._gather = CachedRowsGather(cache, comm, heads, max(p.length for p in plans))

    def before(self, layer: AttentionLayer, new_rows: Tensor) -> Iterator[tuple[PlannedAttention, slice, Tensor]]:
        """Kernels, which of the queries they are for, and `[places * length + N, K, W]` what those may see.

        That is what was cached, and behind it `new_rows [N, K, W]`. A gather for each.
        """
        for planned, queries, slots, length in self._parts:
            cached = [self._gather(layer.index, slots, length)] if length else []
            yield planned, queries, torch.cat([*cached, new_rows]) if cached else new_rows


class CachedRowsGather:
    """Gathers cached rows from all places of an axis, `max_length` of each at most, through one pair of buffers."""

    def __init__(self, cache: PagedKVCache, comm: AxisComm, heads: GroupHeads, max_length: int) -> None:
        self._cache = cache
        self._comm = comm
        self._own = heads.own
        self._send = cache.new_rows(max_length, len(heads.kv_heads))
        self._gathered = room_for_all(self._send, comm.size)

    def __call__(self, layer: int, slots: Tensor, length: int) -> Tensor:
        """`[places * length, K, W]`: what is at `slots` of each place, padded, in the heads of this rank's queries."""
        send = self._send[:length]
        # Rows beyond this rank's own are padding, which nobody attends to.
        copies = zip(self._cache.parts(*self._cache.read(layer)), self._cache.views(send), strict=False)
        copy_rows(list(copies), slots, None)  # in the model's dtype, in which it travels
        # A shorter window fits into the front of the flat buffer.
        room = self._gathered.view(-1)[: self._comm.size * send.numel()].view(self._comm.size, *send.shape)
        return self._comm.all_gather(send, room).flatten(0, 1)[:, self._own]


def run_stored_heads(
    planned: PlannedAttention, q: Tensor, keys: Tensor, values: Tensor, heads: GroupHeads, layer: AttentionLayer
) -> State:
    """All query heads of a DCP group over all KV heads that it stores.

    Kernels share KV heads evenly, so where a mixed group does not, each KV head is a call of its own.
    """
    if len(set(heads.q_per_kv)) == 1:
        return layer.run(planned, q, keys, values)
    outs, lses = [], []
    first = 0
    for head, num_q_heads in enumerate(heads.q_per_kv):
        one = slice(head, head + 1)
        out, lse = layer.run(planned, q[:, first : first + num_q_heads], keys[:, one], values[:, one])
        outs.append(out.clone())  # the next call may use the same memory
        lses.append(lse.clone())
        first += num_q_heads
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def room_for_all(send: Tensor, size: int) -> Tensor:
    """Where a gather of `send` over `size` places goes, layer after layer."""
    return send.new_empty(size, *send.shape) if size > 1 else send.unsqueeze(0)
