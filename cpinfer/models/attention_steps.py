"""What attention does in one step of the model: exchange, cache write, kernel, merge.

A step is built once, with its plan, and then called by every layer through the attention hook. Letters: T new tokens of
this rank, R decode rows of each pcp rank, S KV shards, C tp columns in a DCP group (S = C * pcp), H query heads and
K KV heads of this rank, D head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cpinfer.backends.base import AttentionBackend
from cpinfer.cache.paged_kv_cache import PagedKVCache
from cpinfer.comm.axis import AxisComm
from cpinfer.layout.decode import DecodePlan
from cpinfer.layout.prefill import PrefillPlan
from cpinfer.ops.states import merge_states, pack_states, unpack_states


class AttentionStep(Protocol):
    """One step of the model, as its attention layers see it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """`[T, H, D]` attention output for q `[T, H, D]` and the new k, v `[T, K, D]` of this rank's tokens."""
        ...


class PrefillStep:
    """Whole prompts, split over the pcp axis: one gather of K and V per layer, then one backend call.

        own k, v [T, K, D] -> send buffer [part_len, K, 2D] -> all_gather over pcp -> [pcp * part_len, K, 2D]
          -> the tokens of this shard go to the cache
          -> every piece attends to the gathered buffer through its page table

    The buffers belong to the step and serve all its layers. A rank without tokens runs one dummy token, whose attention
    output is zero and which nobody reads.
    """

    def __init__(self, plan: PrefillPlan, backend: AttentionBackend, cache: PagedKVCache, pcp: AxisComm) -> None:
        device = cache.device
        self._planned = backend.plan(plan.rows)
        self._cache = cache
        self._pcp = pcp
        self._num_tokens = len(plan.positions)
        self._send_rows = torch.from_numpy(plan.send_rows).to(device)
        self._write_src = torch.from_numpy(plan.write_src).to(device)
        self._write_slots = torch.from_numpy(plan.write_slots).to(device)
        layout = cache.layout
        # Zeros: the padding travels too, and whatever a kernel may read must be finite.
        self._send = torch.zeros(
            plan.split.part_len, layout.num_heads, layout.k_dim + layout.v_dim, dtype=cache.dtype, device=device
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        T = self._num_tokens
        keys, values = self._gather(k[:T], v[:T])
        self._cache.write(
            layer,
            self._write_slots,
            keys.index_select(0, self._write_src),
            values.index_select(0, self._write_src),
        )
        out, _ = self._planned.run(q[:T], keys, values, scale=scale)
        return out if len(q) == T else q.new_zeros(len(q), *out.shape[1:])

    def _gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of all ranks' tokens, `[pcp * part_len, K, D]` each, as views of one buffer."""
        k_dim = k.shape[-1]
        self._send[..., :k_dim].index_copy_(0, self._send_rows, k)
        self._send[..., k_dim:].index_copy_(0, self._send_rows, v)
        gathered = self._pcp.all_gather(self._send).flatten(0, 1)
        return gathered[..., :k_dim], gathered[..., k_dim:]


class DecodeStep:
    """One new token for every running sequence: two collectives per layer over the DCP group, none at dcp=1.

        q, k, v of own rows [R, ...] -> all_gather -> q [pcp * R, C * H, D], k and v [pcp * R, K, D]
          -> the owner of a token writes it
          -> all rows and heads attend to the keys of this shard: (out, lse) [pcp * R, C * H, D + 1]
          -> all_to_all: each rank gets the S partial states of its own rows and heads, merged in shard order

    The places of a DCP group run pcp fastest, so a gathered `[S, ...]` is `[C, pcp, ...]`. When C > 1 its columns are
    copies of one KV head (mixed groups are refused), so heads of different columns may stand side by side.
    """

    def __init__(
        self,
        plan: DecodePlan,
        backend: AttentionBackend,
        cache: PagedKVCache,
        dcp: AxisComm,
        *,
        pcp_size: int,
        wire_dtype: torch.dtype,
    ) -> None:
        self._planned = backend.plan(plan.rows)
        self._cache = cache
        self._dcp = dcp
        self._pcp_size = pcp_size
        self._columns = dcp.size // pcp_size
        self._wire_dtype = wire_dtype
        self._write_src = torch.from_numpy(plan.write_src).to(cache.device)
        self._write_slots = torch.from_numpy(plan.write_slots).to(cache.device)
        if dcp.size % pcp_size:
            raise ValueError(f"{dcp.size} KV shards over pcp={pcp_size}: several homes are not supported")
        if self._columns > 1 and cache.layout.num_heads > 1:
            raise ValueError("a DCP group over several tp columns needs one KV head per rank")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        if self._dcp.size == 1:
            self._write(layer, k, v)
            return self._planned.run(q, *self._cache.read(layer), scale=scale)[0]
        q_rows, k_rows, v_rows = self._gather(q, k, v)
        self._write(layer, k_rows, v_rows)
        out, lse = self._planned.run(q_rows, *self._cache.read(layer), scale=scale)
        return self._return_partials(out, lse, q.shape[1]).to(q.dtype)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        src = self._write_src
        self._cache.write(layer, self._write_slots, k.index_select(0, src), v.index_select(0, src))

    def _gather(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (R, H, D), K = q.shape, k.shape[1]
        if self._pcp_size == 1:  # every rank of the group computed the same rows, so it has their k and v
            gathered = self._dcp.all_gather(q.flatten(1))
            return self._rows_by_heads(gathered, R, H, D), k, v
        gathered = self._dcp.all_gather(torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1))
        q_part, k_part, v_part = gathered.split([H * D, K * D, K * v.shape[-1]], dim=-1)
        # Any column will do for k and v, they are copies: the first `pcp` places are column 0.
        k_rows, v_rows = (x[: self._pcp_size].reshape(self._pcp_size * R, K, -1) for x in (k_part, v_part))
        return self._rows_by_heads(q_part, R, H, D), k_rows, v_rows

    def _rows_by_heads(self, x: Tensor, R: int, H: int, D: int) -> Tensor:
        """`[S, R, H * D]` to `[pcp * R, C * H, D]`."""
        x = x.reshape(self._columns, self._pcp_size, R, H, D).permute(1, 2, 0, 3, 4)
        return x.reshape(self._pcp_size * R, self._columns * H, D)

    def _return_partials(self, out: Tensor, lse: Tensor, H: int) -> Tensor:
        """Partial states `[pcp * R, C * H, D]` of this shard to the ranks that own row and head; theirs, merged."""
        packed = pack_states(out, lse, self._wire_dtype)
        packed = packed.reshape(self._pcp_size, -1, self._columns, H, packed.shape[-1]).permute(2, 0, 1, 3, 4)
        received = self._dcp.all_to_all(packed.flatten(0, 1).contiguous())
        states = [unpack_states(shard, out.shape[-1]) for shard in received]
        return merge_states(states)[0]
