"""What a chunk with context receives is what `exchange_bytes` says, for both exchanges, counted on the wire."""

from __future__ import annotations

import pytest
import torch

from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.attention.context import KVContext, QueryContext
from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.attention.layer import AttentionLayer, LatentLayer
from cpinfer.comm.axis import CountingComm
from cpinfer.comm.threads import run_ranks
from cpinfer.comm.topology import Topology
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import (
    Context,
    StepContext,
    exchange_bytes,
    exchange_places,
    plan_kv_exchange,
    plan_query_exchange,
)
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.shards import KVSharding

CPU = torch.device("cpu")
NUM_NEW = [40, 7, 90]
NUM_CACHED = [100, 0, 33]
HEADS, DIM, BLOCK = 4, 8, 4


# Of every kind of cache: its layout, KV heads of a model of one column, the layer.
LATENT = LatentLayer(0, 1.0, w_k=torch.randn(HEADS, 6, 8), w_v=torch.randn(HEADS, 5, 8))
LAYER = AttentionLayer(0, 1.0)
KINDS = {"one_head": (KVLayout(1, DIM, DIM), LAYER), "latent": (KVLayout(1, 8 + 4, 8, v_is_prefix_of_k=True), LATENT)}
SIZES = [(1, 2, 2), (1, 3, 3), (1, 4, 2), (1, 2, 1), (2, 2, 4), (2, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("exchange", ["queries", "kv"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_counted_bytes_of_context_are_those_of_the_formula(
    sizes: tuple[int, int, int], kind: str, exchange: str
) -> None:
    grid = RankGrid(*sizes)
    check(grid, HeadPlacement(HEADS * grid.tp_size, 1, grid.tp_size), *KINDS[kind], exchange)


@pytest.mark.parametrize("exchange", ["queries", "kv"])
@pytest.mark.parametrize("sizes", [(2, 2, 4), (2, 1, 2), (4, 1, 4)])
def test_groups_that_mix_heads_send_all_that_they_store(sizes: tuple[int, int, int], exchange: str) -> None:
    grid = RankGrid(*sizes)
    check(grid, HeadPlacement(HEADS * grid.tp_size, 2, grid.tp_size), KVLayout(2, DIM, DIM), LAYER, exchange)


def check(grid: RankGrid, heads: HeadPlacement, kv: KVLayout, layer: AttentionLayer, exchange: str) -> None:
    """Count what a chunk with context receives on every rank of `grid`; hold it against the formula."""
    sharding = KVSharding(grid.dcp_size, 3, BLOCK)
    split = zigzag_split(NUM_NEW, grid.pcp_size)
    tables = [list(range(i * 30, i * 30 + 30)) for i in range(3)]
    contexts = [Context(n, i % grid.num_homes, tables[i]) for i, n in enumerate(NUM_CACHED)]
    is_latent = isinstance(layer, LatentLayer)

    def body(topology: Topology) -> tuple[int, int]:
        cache = PagedKVCache(kv, 1, 90, BLOCK, torch.float32, CPU)
        comm = CountingComm(topology.pcp if grid.context_runs_over_pcp else topology.dcp)
        step = StepContext(split, contexts, sharding, exchange_places(grid, topology.rank))
        backend = TorchBackend(CPU)
        stored = heads.in_group(grid, topology.coords.tp_rank)
        assert len(stored.kv_heads) == kv.num_heads
        if exchange == "queries":
            states = AllToAllExchange(comm, pcp_size=grid.pcp_size, wire_dtype=torch.float32)
            plan = plan_query_exchange(step, comm.index)
            context: QueryContext | KVContext = QueryContext(plan, backend, cache, states, stored)
        else:
            context = KVContext(plan_kv_exchange(step, comm.index, 64), backend, cache, comm, stored)
        tokens = split.tokens_per_rank()[topology.coords.pcp_rank]
        out, _ = context.attend(layer, torch.randn(tokens, HEADS, 6 + 4 if is_latent else DIM))
        assert out.shape == (tokens, HEADS, 5 if is_latent else DIM)
        formula = exchange_bytes(exchange, step, HEADS, kv, dtype_bytes=4)
        return comm.traffic.received_bytes, formula

    for counted, formula in run_ranks(grid, body):
        assert counted == formula
