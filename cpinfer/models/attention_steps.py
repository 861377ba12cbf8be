"""What attention does in one step of the model: exchange, cache write, kernel, merge.

A step is built once, with its plan, and then called by every layer through the attention hook. Letters: T new tokens of
this rank, R decode rows of each pcp rank, S KV shards, H query heads and K KV heads of this rank, D head dim.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cpinfer.backends.base import AttentionBackend
from cpinfer.cache.paged_kv_cache import PagedKVCache
from cpinfer.comm.axis import AxisComm
from cpinfer.layout.context import KVExchange, KVWindow, QueryExchange
from cpinfer.layout.decode import DecodePlan
from cpinfer.layout.prefill import PrefillPlan
from cpinfer.layout.shards import IntArray
from cpinfer.models.state_exchange import StateExchange
from cpinfer.ops.states import State, merge_states


class AttentionStep(Protocol):
    """One step of the model, as its attention layers see it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """`[T, H, D]` attention output for q `[T, H, D]` and the new k, v `[T, K, D]` of this rank's tokens."""
        ...


class ContextAttention(Protocol):
    """Attention of new tokens to what is cached of their prompts."""

    def attend(self, layer: int, q: Tensor, *, scale: float) -> State:
        """`out [T, H, D]`, `lse [T, H]` for q `[T, H, D]`; T may be 0. Collective over the exchange axis."""
        ...


class PrefillStep:
    """New tokens of prompts, split over the pcp axis: one gather of K and V per layer, then one backend call.

        own k, v [T, K, D] -> send buffer [part_len, K, 2D] -> all_gather over pcp -> [pcp * part_len, K, 2D]
          -> the tokens of this shard go to the cache
          -> every piece attends to the gathered buffer through its page table, and to its `context` if there is any

    The buffers belong to the step and serve all its layers. A rank without tokens runs one dummy token, whose attention
    output is zero and which nobody reads.
    """

    def __init__(
        self,
        plan: PrefillPlan,
        backend: AttentionBackend,
        cache: PagedKVCache,
        pcp: AxisComm,
        context: ContextAttention | None = None,
    ) -> None:
        self._planned = backend.plan(plan.rows)
        self._cache = cache
        self._pcp = pcp
        self._context = context
        self._num_tokens = len(plan.positions)
        self._send_rows = _on(cache.device, plan.send_rows)
        self._write_src = _on(cache.device, plan.write_src)
        self._write_slots = _on(cache.device, plan.write_slots)
        # Zeros: the padding travels too, and whatever a kernel may read must be finite.
        self._send = cache.new_rows(plan.split.part_len)
        self._gathered = _room_for_all(self._send, pcp.size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        T = self._num_tokens
        keys, values = self._gather(k[:T], v[:T])
        self._cache.write(
            layer,
            self._write_slots,
            keys.index_select(0, self._write_src),
            values.index_select(0, self._write_src),
        )
        state = self._planned.run(q[:T], keys, values, scale=scale)
        if self._context is not None:
            state = merge_states([self._context.attend(layer, q[:T], scale=scale), state])
        out = state[0].to(q.dtype)
        return out if len(q) == T else q.new_zeros(len(q), *out.shape[1:])

    def _gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of all ranks' tokens, `[pcp * part_len, K, D]` each, as views of one buffer."""
        self._send[..., : k.shape[-1]].index_copy_(0, self._send_rows, k)
        self._send[..., k.shape[-1] :].index_copy_(0, self._send_rows, v)
        return _split_kv(self._pcp.all_gather(self._send, self._gathered), k.shape[-1])


class QueryContext:
    """The queries travel to the cached KV: gather q, attend to this shard, and return the partial states."""

    def __init__(
        self, plan: QueryExchange, backend: AttentionBackend, cache: PagedKVCache, exchange: StateExchange
    ) -> None:
        self._planned = backend.plan(plan.rows)
        self._cache = cache
        self._exchange = exchange
        self._part_len = plan.part_len

    def attend(self, layer: int, q: Tensor, *, scale: float) -> State:
        T, H, D = q.shape
        padded = q if self._part_len == T else torch.cat([q, q.new_zeros(self._part_len - T, H, D)])
        state = self._planned.run(self._exchange.gather_rows(padded), *self._cache.read(layer), scale=scale)
        out, lse = self._exchange.return_partials(state, H)
        return out[:T], lse[:T]


class KVContext:
    """The cached KV travels to the queries: window after window is gathered, attended to, and merged."""

    def __init__(self, plan: KVExchange, backend: AttentionBackend, cache: PagedKVCache, comm: AxisComm) -> None:
        self._windows = [(w, backend.plan(w.rows), _on(cache.device, w.slots)) for w in plan.windows]
        self._cache = cache
        self._comm = comm
        # One buffer for all windows and layers: its rows beyond a window's own tokens are padding nobody attends to.
        self._send = cache.new_rows(max(w.length for w in plan.windows))
        self._gathered = _room_for_all(self._send, comm.size)

    def attend(self, layer: int, q: Tensor, *, scale: float) -> State:
        states = []
        for window, planned, slots in self._windows:
            keys, values = self._gather(layer, window, slots)
            states.append(planned.run(q, keys, values, scale=scale))
        return merge_states(states)

    def _gather(self, layer: int, window: KVWindow, slots: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.read(layer)
        send = self._send[: window.length]
        send[: len(slots), :, : keys.shape[-1]] = keys.index_select(0, slots)
        send[: len(slots), :, keys.shape[-1] :] = values.index_select(0, slots)
        # The windows but the last are equally long; that one fits into the front of the flat buffer.
        room = self._gathered.view(-1)[: self._comm.size * send.numel()].view(self._comm.size, *send.shape)
        return _split_kv(self._comm.all_gather(send, room), keys.shape[-1])


class DecodeStep:
    """One new token for every running sequence: two collectives per layer over the DCP group, none at dcp=1.

        q, k, v of own rows [R, ...] -> all_gather -> q [pcp * R, C * H, D], k and v [pcp * R, K, D]
          -> the owner of a token writes it
          -> all rows and heads attend to the keys of this shard: (out, lse) [pcp * R, C * H, D + 1]
          -> each rank gets the S partial states of its own rows and heads, merged in shard order

    With queries replicated (`exchange.replicated`) all ranks have computed all rows, so nothing needs to be gathered
    first; the partial states come back by one all_gather.
    """

    def __init__(
        self, plan: DecodePlan, backend: AttentionBackend, cache: PagedKVCache, exchange: StateExchange
    ) -> None:
        self._planned = backend.plan(plan.rows)
        self._cache = cache
        self._exchange = exchange
        self._write_src = _on(cache.device, plan.write_src)
        self._write_slots = _on(cache.device, plan.write_slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        q_rows, k_rows, v_rows = self._exchange.gather_qkv(q, k, v)
        src = self._write_src
        self._cache.write(layer, self._write_slots, k_rows.index_select(0, src), v_rows.index_select(0, src))
        state = self._planned.run(q_rows, *self._cache.read(layer), scale=scale)
        return self._exchange.return_partials(state, q.shape[1])[0].to(q.dtype)


class IdleStep:
    """A decode step in which this rank's home has no sequence: its dummy row attends to nothing."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])


def _split_kv(gathered: Tensor, k_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values, `[places * length, K, D]` each, of a gathered `[places, length, K, 2D]`; views."""
    flat = gathered.flatten(0, 1)
    return flat[..., :k_dim], flat[..., k_dim:]


def _room_for_all(send: Tensor, size: int) -> Tensor:
    """Where a gather of `send` over `size` places goes, layer after layer."""
    return send.new_empty(size, *send.shape) if size > 1 else send


def _on(device: torch.device, array: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
