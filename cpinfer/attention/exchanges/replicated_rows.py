"""All rows on all ranks: nothing travels to the shards, and states come back by one all-gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.comm.axis import AxisComm
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.rules import LayoutSizes
from cpinfer.ops.states import State, merge_packed, pack_by_place
from cpinfer.refusals import refuse


class ReplicatedRowsExchange(StateExchange):
    """Every rank of a home has computed every decode row, so its own rows are all rows (`pcp_size` is 1 here).

    One collective fewer, for linear layers that compute each row on each pcp rank.
    """

    replicates_rows = True

    def __init__(
        self, comm: AxisComm, *, pcp_size: int, wire_dtype: torch.dtype, kv_columns: Sequence[int] = (0,)
    ) -> None:
        super().__init__(comm, pcp_size=pcp_size, wire_dtype=wire_dtype, kv_columns=kv_columns)
        self._columns = 1

    @classmethod
    def row_ranks(cls, grid: RankGrid) -> int:
        return 1

    @classmethod
    def layout_error(cls, sizes: LayoutSizes) -> UserError | None:
        return refuse("replicate_q", str(sizes)) if sizes.dcp_size > sizes.pcp_size else None

    def gather_rows(self, q: Tensor) -> Tensor:
        return q

    def _return(self, out: Tensor, lse: Tensor) -> State:
        (packed,) = pack_by_place(out, lse, self._wire_dtype, pcp_size=1, columns=1)
        return merge_packed(self._comm.all_gather(packed), out.shape[-1])
