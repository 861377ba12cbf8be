"""Over which axes the attention of an engine's steps exchanges what, as its layout and its config want."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.attention.exchanges.ordered import OrderedExchange
from cpinfer.attention.exchanges.registry import context_exchange, decode_exchange
from cpinfer.comm.axis import AxisComm
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.layout.heads import GroupHeads


@dataclass(frozen=True)
class Exchanges:
    """`prefill_comm`: where new K/V are gathered; `context_comm`: where cached K/V, or the queries for them, travel.

    `decode` and `context` bring queries to shards and states back. A decode row is computed by one of `row_ranks` pcp
    ranks of its home.
    """

    prefill_comm: AxisComm
    context_comm: AxisComm
    decode: StateExchange
    context: StateExchange
    row_ranks: int

    @classmethod
    def of(cls, topology: Topology, heads: GroupHeads, config: EngineConfig, dtype: torch.dtype) -> Exchanges:
        """Those of one rank, which stores `heads`, for a model of this dtype."""
        grid = topology.grid
        wire_dtype = dtype if config.cp_wire_dtype == "auto" else getattr(torch, config.cp_wire_dtype)
        of_decode, of_context = decode_exchange(config.decode_exchange), context_exchange(config.decode_exchange)
        if config.deterministic:
            of_decode = OrderedExchange
        row_ranks = of_decode.row_ranks(grid)
        decode = of_decode(topology.dcp, pcp_size=row_ranks, wire_dtype=wire_dtype, kv_columns=heads.columns)
        context_comm = topology.pcp if grid.context_runs_over_pcp else topology.dcp
        context = of_context(context_comm, pcp_size=grid.pcp_size, wire_dtype=wire_dtype)
        # New K/V of a prefill go to all who store them or attend to them: beyond the pcp axis where heads are mixed.
        prefill_comm = topology.dcp if heads.is_mixed else topology.pcp
        return cls(prefill_comm, context_comm, decode, context, row_ranks)
