"""States of virtual shards come back by one all-to-all in float32, and merge in the order of virtual shards.

So a row's state is the same bits however many ranks hold its keys (`ops/ordered_attention.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.ops.ordered_attention import merge_ordered
from cpinfer.ops.states import State, by_place, pack_states, unpack_states


class OrderedExchange(StateExchange):
    """States have one dim more, of the virtual shards of this shard: `out [pcp * R, C * H, N, D]`, `lse [.., N]`.

    Of S shards, shard s holds virtual shards s, s + S, s + 2 S, ...
    """

    def return_partials(self, state: State) -> State:
        if self._comm.size > 1:
            return self._return(*state)
        out, lse = state
        return merge_ordered(out.movedim(2, 0), lse.movedim(2, 0))

    def _return(self, out: Tensor, lse: Tensor) -> State:
        packed = self._comm.all_to_all(by_place(pack_states(out, lse, torch.float32), self._pcp_size, self._columns))
        outs, lses = unpack_states(packed, out.shape[-1])  # [S, R, H, N, D] and [S, R, H, N]
        return merge_ordered(*(x.movedim(3, 0).flatten(0, 1) for x in (outs, lses)))
