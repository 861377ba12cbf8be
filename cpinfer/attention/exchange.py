"""How partial attention over KV shards becomes whole: rows to every shard, states back to the rows' owners.

Rows go by all-gather; states come back by one all-to-all, or by all-gather and reduce-scatter, as in vLLM.

The places of the axis run pcp fastest: a gathered `[S, ...]` is `[C, pcp, ...]`, with C tp columns. Query heads of the
columns stand side by side, in order. Their KV heads are copies of one, of which any column's will do, or differ (mixed
groups): then `kv_columns` says whose make up the heads that every rank of the group stores.

    own rows [R, H, D]  -- gather -->  all rows, all columns' heads [pcp * R, C * H, D]
    partial states [pcp * R, C * H]  -- return -->  own rows and heads, S states each, merged in shard order

Letters: R rows of each pcp rank, S places, C columns, H query heads and K KV heads of this rank, G stored KV heads, D
head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cpinfer.comm.axis import AxisComm
from cpinfer.ops.states import State, by_place, merge_packed, pack_by_place

StateReturn = Literal["a2a", "ag_rs", "replicate_q"]


class StateExchange:
    """Exchange along one axis, of `size` places with `pcp_size` of them in a column. A solo axis moves nothing.

    How states come back: `a2a`, one all-to-all of packed (out, lse). `ag_rs`, an all-gather of lse and a reduce-scatter
    of outputs already weighted by it, in float32. `replicate_q`, one all-gather of packed states, where every rank has
    computed every row (`pcp_size` is then 1 here, and so is C).
    """

    def __init__(
        self,
        comm: AxisComm,
        *,
        pcp_size: int,
        wire_dtype: torch.dtype,
        state_return: StateReturn = "a2a",
        kv_columns: Sequence[int] = (0,),
    ) -> None:
        self.replicated = state_return == "replicate_q"
        if comm.size % pcp_size:
            raise ValueError(f"{comm.size} places do not divide into columns of {pcp_size} pcp ranks")
        self._comm = comm
        self._pcp_size = pcp_size
        self._columns = 1 if self.replicated else comm.size // pcp_size
        self._wire_dtype = wire_dtype
        self._state_return = state_return
        self._kv_columns = kv_columns

    def gather_qkv(self, q: Tensor, new_kv: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """q `[pcp * R, C * H, D]`, new K/V `[pcp * R, G, D]` of all rows, from q `[R, H, D]`, K/V `[R, K, D]`."""
        if self._pcp_size == 1 and len(self._kv_columns) == 1:
            # All ranks of the group computed these rows and the heads they store, so they have the new K/V.
            return self.gather_rows(q), list(new_kv)
        R, H, D = q.shape
        packed = [q, *new_kv]
        gathered = self._comm.all_gather(torch.cat([x.flatten(1) for x in packed], dim=-1))
        q_part, *kv_parts = torch.split(gathered, [x[0].numel() for x in packed], dim=-1)
        stored = [self._stored_heads(part, x) for part, x in zip(kv_parts, new_kv, strict=True)]
        return self._rows_by_heads(q_part, R, H, D), stored

    def gather_rows(self, q: Tensor) -> Tensor:
        """`[pcp * R, C * H, D]` of all rows from own q `[R, H, D]`."""
        if self._comm.size == 1 or self.replicated:
            return q
        return self._rows_by_heads(self._comm.all_gather(q.flatten(1)), *q.shape)

    def return_partials(self, state: State) -> State:
        """`out [R, H, D]` (float32 where states merged) and `lse [R, H]` of own rows and heads."""
        if self._comm.size == 1:
            return state
        if self._state_return == "a2a":
            return self._by_all_to_all(*state)
        if self._state_return == "ag_rs":
            return self._by_reduce_scatter(*state)
        return self._by_all_gather(*state)

    def _rows_by_heads(self, x: Tensor, R: int, H: int, D: int) -> Tensor:
        """`[S, R, H * D]` to `[pcp * R, C * H, D]`."""
        x = x.reshape(self._columns, self._pcp_size, R, H, D).permute(1, 2, 0, 3, 4)
        return x.reshape(self._pcp_size * R, self._columns * H, D)

    def _stored_heads(self, gathered: Tensor, own: Tensor) -> Tensor:
        """`[S, R, K * D]` to `[pcp * R, G, D]`, for own `[R, K, D]`."""
        columns = gathered.reshape(self._columns, -1, *own.shape[1:])
        picked = [columns[c] for c in self._kv_columns]
        return picked[0] if len(picked) == 1 else torch.cat(picked, dim=1)

    def _by_all_to_all(self, out: Tensor, lse: Tensor) -> State:
        packed = pack_by_place(out, lse, self._wire_dtype, self._pcp_size, self._columns)
        return merge_packed(self._comm.all_to_all(packed), out.shape[-1])

    def _by_all_gather(self, out: Tensor, lse: Tensor) -> State:
        (packed,) = pack_by_place(out, lse, self._wire_dtype, pcp_size=1, columns=1)
        return merge_packed(self._comm.all_gather(packed), out.shape[-1])

    def _by_reduce_scatter(self, out: Tensor, lse: Tensor) -> State:
        lses = self._comm.all_gather(lse)
        peak = lses.amax(dim=0)
        total = torch.logsumexp(lses - torch.where(peak == -torch.inf, 0.0, peak), dim=0) + peak
        total = torch.where(peak == -torch.inf, peak, total)
        share = torch.exp(lse - torch.where(total == -torch.inf, 0.0, total))
        weighted = share.unsqueeze(-1) * out.float()
        weighted, total = (by_place(x, self._pcp_size, self._columns) for x in (weighted, total))
        return self._comm.reduce_scatter(weighted), total[self._comm.index]
