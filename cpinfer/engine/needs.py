"""What an engine asks of a rank: attention kernels for the heads that it holds, and memory for a KV pool."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize, LayerKind, StepBackends
from cpinfer.attention.backends.ordered_backend import OrderedBackend
from cpinfer.attention.backends.registry import backend_bytes, make_backend
from cpinfer.attention.exchanges.registry import decode_exchange
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.errors import UserError
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.kv_cache.state_cache import StateCache
from cpinfer.kv_cache.state_pool import StatePool
from cpinfer.kv_cache.state_store import StateStore
from cpinfer.layout.capacity import KVLayout, PoolSize
from cpinfer.layout.decode import cuda_graph_batch_size
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import GroupHeads
from cpinfer.layout.shards import KVSharding
from cpinfer.models.runner import ModelRunner
from cpinfer.models.spec import ModelSpec

CPU_KV_CACHE_GIB = 0.25
CUDA_KV_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class RankNeeds:
    """What one rank's part of a model needs while its engine is awake.

    `attention`: what its kernels must be able to do. `kv_layout` and `cache_dtype`: of the rows that it stores.
    `pool_size`: what all ranks can afford. `num_cached_states`: those behind prefixes for which there is room.
    """

    attention: AttentionNeeds
    kv_layout: KVLayout
    cache_dtype: str
    pool_size: PoolSize
    num_cached_states: int

    @classmethod
    def of(cls, runner: ModelRunner, topology: Topology, config: EngineConfig, pool_size: PoolSize) -> RankNeeds:
        """Those of the rank at its place in the topology."""
        heads = runner.spec.heads(topology.grid.tp_size).in_group(topology.grid, topology.coords.tp_rank)
        cache_dtype = config.cache_dtype(_name(runner.dtype))
        needs = attention_needs(
            runner.spec,
            heads,
            runner.dtype,
            getattr(torch, cache_dtype),
            replayed_sizes(runner.spec, config, topology.grid),
        )
        num_cached = cached_states(runner.spec, config, _name(runner.dtype))
        return cls(needs, runner.spec.kv_layout(len(heads.kv_heads)), cache_dtype, pool_size, num_cached)

    def pool_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the KV pool, and of states beside it."""
        per_token = self.kv_layout.bytes_per_token(spec.num_kv_layers, self.cache_dtype)
        num_bytes = self.pool_size.num_blocks * self.pool_size.sharding.block_size * per_token
        if spec.states is not None:
            num_states = self.pool_size.num_states + self.num_cached_states
            num_bytes += num_states * spec.states.bytes_per_sequence(_name(self.attention.dtype))
        return num_bytes

    def make_cache(self, runner: ModelRunner, *, has_padding_block: bool) -> PagedKVCache:
        """The KV pool's memory."""
        return PagedKVCache(
            self.kv_layout,
            runner.spec.num_kv_layers,
            self.pool_size.num_blocks,
            self.pool_size.sharding.block_size,
            runner.dtype,
            runner.device,
            has_padding_block=has_padding_block,
            store_dtype=self.attention.cache_dtype,
        )

    def make_states(self, runner: ModelRunner) -> StateStore | None:
        """The memory of states, None for a model that has none."""
        spec = runner.spec
        if spec.states is None:
            return None
        num_slots = self.pool_size.num_states + self.num_cached_states
        return StateStore(spec.states, spec.linear_layers, num_slots, runner.dtype, runner.device)

    def make_backends(self, config: EngineConfig, device: torch.device) -> StepBackends:
        """The attention kernels, and what they work in."""
        if not config.deterministic:
            backend = make_backend(config.backend, device, self.attention)
            return StepBackends(backend, backend)
        num_shards, sharding = config.deterministic_kv_shards, self.pool_size.sharding
        return StepBackends(
            OrderedBackend(num_shards, sharding.interleave),
            OrderedBackend(num_shards // sharding.num_shards, sharding.interleave, keeps_states=True),
        )

    def empty_homes(self, num_homes: int, *, row_ranks: int, enable_prefix_caching: bool) -> list[KVHome]:
        """The blocks of the pool in each home, and places for states on its `row_ranks`, all of them free.

        A prefix whose KV is remembered is of no use without the state behind it.
        """
        pool = self.pool_size
        return [
            KVHome(
                pool.num_blocks,
                pool.sharding,
                enable_prefix_caching=enable_prefix_caching and (self.num_cached_states > 0 or not pool.num_states),
                states=StatePool(row_ranks, pool.num_states) if pool.num_states else None,
            )
            for _ in range(num_homes)
        ]

    def empty_state_cache(self, pcp_size: int) -> StateCache | None:
        """Places for states behind prefixes on all pcp ranks, None where none are kept."""
        num_slots = self.num_cached_states
        return StateCache(pcp_size, num_slots, self.pool_size.num_states) if num_slots else None


def own_pool(runner: ModelRunner, topology: Topology, config: EngineConfig) -> PoolSize:
    """The KV pool that this rank alone could afford. UserError when it is no single block, or beyond all memory."""
    heads = runner.spec.heads(topology.grid.tp_size).in_group(topology.grid, topology.coords.tp_rank)
    memory = _memory_bytes(runner.device)
    for name in ("kv_cache_gib", "state_cache_gib", "prepacked_weights_gib"):
        gib = getattr(config, name) or 0
        if gib * 2**30 > memory:
            raise UserError(
                f"{name}={gib:g} is more than the {memory / 2**30:.1f} GiB of memory of {runner.device}. Lower it."
            )
    dtype = _name(runner.dtype)
    return affordable_pool(
        runner.spec,
        len(heads.kv_heads),
        topology.grid,
        config,
        dtype,
        runner.device,
        kernel_bytes(runner.spec, heads, topology.grid, config, dtype, runner.device),
    )


def kernel_bytes(
    spec: ModelSpec, heads: GroupHeads, grid: RankGrid, config: EngineConfig, dtype: str, device: torch.device
) -> int:
    """What the attention kernels of a rank with these heads keep on its device beside the KV pool, at most."""
    if config.deterministic:  # Triton's, which work in registers
        return 0
    dtypes = (getattr(torch, dtype), getattr(torch, config.cache_dtype(dtype)))
    needs = attention_needs(spec, heads, *dtypes, replayed_sizes(spec, config, grid))
    return backend_bytes(config.backend, device, needs)


def replayed_sizes(spec: ModelSpec, config: EngineConfig, grid: RankGrid) -> tuple[FixedSize, ...]:
    """Rows and blocks of the decode steps that may be captured in CUDA graphs, of all ranks of a home."""
    if not config.cuda_graphs:
        return ()
    row_ranks = decode_exchange(config.decode_exchange).row_ranks(grid)
    own_rows = range(1, -(-config.max_num_seqs // row_ranks) + 1)
    blocks = KVSharding(grid.dcp_size, config.interleave, config.block_size).num_blocks(spec.max_positions)
    rows = sorted({row_ranks * cuda_graph_batch_size(n) for n in own_rows})
    return tuple(FixedSize(n, n * blocks) for n in rows)


def attention_needs(
    spec: ModelSpec,
    heads: GroupHeads,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    replayed: tuple[FixedSize, ...] = (),
) -> AttentionNeeds:
    """What a rank with these heads asks of its attention backend."""
    own_heads = heads.num_q_heads
    own_kv_heads = heads.own.stop - heads.own.start
    calls = {(own_heads, spec.kv_layout(own_kv_heads))}
    if len(set(heads.q_per_kv)) == 1:
        calls.add((sum(heads.q_per_kv), spec.kv_layout(len(heads.kv_heads))))
    else:  # one call per KV head
        calls |= {(num_q_heads, spec.kv_layout(1)) for num_q_heads in heads.q_per_kv}
    if spec.latent is not None:
        calls.add((own_heads, KVLayout(own_heads, spec.head_dim, spec.latent.v_head_dim)))
    ordered = sorted(calls, key=lambda call: (call[0], call[1].num_heads))
    layers = {LayerKind(window is not None, spec.has_soft_cap) for window in spec.windows}
    return AttentionNeeds(dtype, tuple(ordered), cache_dtype, tuple(sorted(layers)), replayed)


def affordable_pool(
    spec: ModelSpec,
    num_heads: int,
    grid: RankGrid,
    config: EngineConfig,
    dtype: str,
    device: torch.device,
    beside_bytes: int = 0,
) -> PoolSize:
    """The KV pool that a rank's budget buys, of `num_heads` stored KV heads, for a model in `dtype`.

    `beside_bytes` of the device are kept free of it, where the config leaves its size open. `spec.states` are those of
    one rank, which have a place for each of `max_num_seqs` sequences, up to half the budget. UserError when it buys no
    single block, or no state.
    """
    per_token = spec.kv_layout(num_heads).bytes_per_token(spec.num_kv_layers, config.cache_dtype(dtype))
    sharding = KVSharding(grid.dcp_size, config.interleave, config.block_size)
    budget = _kv_budget_bytes(config, device, beside_bytes)
    pool = PoolSize.from_bytes(budget, per_token, sharding)
    if spec.states is not None:
        # A sequence has its state on one of the pcp ranks, whatever the number of homes.
        per_state, max_states = spec.states.bytes_per_sequence(dtype), -(-config.max_num_seqs // grid.pcp_size)
        pool = PoolSize.beside_states(budget, per_token, sharding, per_state, max_states)
        if pool.num_states == 0:
            raise UserError(
                f"half the KV budget of {budget} bytes buys no state of a sequence, {per_state} bytes. Raise "
                "kv_cache_gib."
            )
        budget -= pool.num_states * per_state
        cached_states(spec, config, dtype)
    if pool.num_blocks == 0:
        needed = per_token * config.block_size
        raise UserError(f"the KV budget of {budget} bytes buys no block of {needed} bytes. Raise kv_cache_gib.")
    return pool


def cached_states(spec: ModelSpec, config: EngineConfig, dtype: str) -> int:
    """How many states behind prefixes a rank keeps; those of `spec` are a rank's, in a model in `dtype`.

    The same on every rank. UserError where the config wants some, and its budget buys none.
    """
    if spec.states is None or not config.state_cache_gib or not config.enable_prefix_caching:
        return 0
    budget, per_state = int(config.state_cache_gib * 2**30), spec.states.bytes_per_sequence(dtype)
    if budget < per_state:
        raise UserError(
            f"state_cache_gib={config.state_cache_gib:g} is {budget} bytes, which buy no state of {per_state} bytes. "
            "Raise it, or set it to 0, with which no prefix is kept."
        )
    return budget // per_state


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_bytes(device: torch.device) -> int:
    """All memory that there is on a device, whoever uses it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kv_budget_bytes(config: EngineConfig, device: torch.device, beside_bytes: int) -> int:
    """Bytes of KV pool on this rank: the config's, else a share of free memory on CUDA and a small pool on CPU."""
    if config.kv_cache_gib is None and device.type == "cuda":
        return int(max(0, torch.cuda.mem_get_info(device)[0] - beside_bytes) * CUDA_KV_CACHE_SHARE)
    return int((config.kv_cache_gib or CPU_KV_CACHE_GIB) * 2**30)
