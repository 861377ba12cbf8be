"""States come back by one all-to-all of packed (out, lse), as vLLM's `a2a` for decode context parallelism."""

from __future__ import annotations

from torch import Tensor

from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.ops.states import State, merge_packed, pack_by_place


class AllToAllExchange(StateExchange):
    """Each rank sends every other the states of its rows and heads, and merges what it gets. One collective."""

    def _return(self, out: Tensor, lse: Tensor) -> State:
        packed = pack_by_place(out, lse, self._wire_dtype, self._pcp_size, self._columns)
        return merge_packed(self._comm.all_to_all(packed), out.shape[-1])
