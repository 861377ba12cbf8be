"""States come back by an all-gather of lse and a reduce-scatter of outputs, as vLLM's `ag_rs`."""

from __future__ import annotations

import torch
from torch import Tensor

from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.ops.states import State, by_place


class ReduceScatterExchange(StateExchange):
    """Every rank learns all lse, weights its outputs by them and lets the collective add them, in float32."""

    def _return(self, out: Tensor, lse: Tensor) -> State:
        lses = self._comm.all_gather(lse)
        peak = lses.amax(dim=0)
        total = torch.logsumexp(lses - torch.where(peak == -torch.inf, 0.0, peak), dim=0) + peak
        total = torch.where(peak == -torch.inf, peak, total)
        share = torch.exp(lse - torch.where(total == -torch.inf, 0.0, total))
        weighted = share.unsqueeze(-1) * out.float()
        weighted, total = (by_place(x, self._pcp_size, self._columns) for x in (weighted, total))
        return self._comm.reduce_scatter(weighted), total[self._comm.index]
