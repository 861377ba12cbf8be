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

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cpinfer.comm.axis import AxisComm
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.rules import LayoutSizes
from cpinfer.ops.states import State


class StateExchange(ABC):
    """Exchange along one axis, of `comm.size` places with `pcp_size` of them in a column. A solo axis moves nothing.

    `replicates_rows`: every rank of a home computes every decode row. What a new exchange has to say is `_return`, how
    states come back; of the rest what differs from here.
    """

    replicates_rows: ClassVar[bool] = False

    def __init__(
        self, comm: AxisComm, *, pcp_size: int, wire_dtype: torch.dtype, kv_columns: Sequence[int] = (0,)
    ) -> None:
        if comm.size % pcp_size:
            raise ValueError(f"{comm.size} places do not divide into columns of {pcp_size} pcp ranks")
        self._comm = comm
        self._pcp_size = pcp_size
        self._columns = comm.size // pcp_size
        self._wire_dtype = wire_dtype
        self._kv_columns = kv_columns

    @property
    def num_shards(self) -> int:
        """S: shards that hold the keys of a row."""
        return self._comm.size

    @classmethod
    def row_ranks(cls, grid: RankGrid) -> int:
        """Over how many pcp ranks of a home the rows of a decode step are dealt."""
        return grid.row_ranks

    @classmethod
    def layout_error(cls, sizes: LayoutSizes) -> UserError | None:
        """Why decode in this layout cannot use it; None where it can."""
        return None

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
        if self._comm.size == 1:
            return q
        return self._rows_by_heads(self._comm.all_gather(q.flatten(1)), *q.shape)

    def return_partials(self, state: State) -> State:
        """`out [R, H, D]` (float32 where states merged) and `lse [R, H]` of own rows and heads."""
        return state if self._comm.size == 1 else self._return(*state)

    def _rows_by_heads(self, x: Tensor, R: int, H: int, D: int) -> Tensor:
        """`[S, R, H * D]` to `[pcp * R, C * H, D]`."""
        x = x.reshape(self._columns, self._pcp_size, R, H, D).permute(1, 2, 0, 3, 4)
        return x.reshape(self._pcp_size * R, self._columns * H, D)

    def _stored_heads(self, gathered: Tensor, own: Tensor) -> Tensor:
        """`[S, R, K * D]` to `[pcp * R, G, D]`, for own `[R, K, D]`."""
        columns = gathered.reshape(self._columns, -1, *own.shape[1:])
        picked = [columns[c] for c in self._kv_columns]
        return picked[0] if len(picked) == 1 else torch.cat(picked, dim=1)

    @abstractmethod
    def _return(self, out: Tensor, lse: Tensor) -> State:
        """`return_partials` over two places or more, from `out [pcp * R, C * H, D]` and `lse [pcp * R, C * H]`."""
