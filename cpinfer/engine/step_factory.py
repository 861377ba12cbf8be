"""Puts together what decides the steps of one rank, and what runs them over a cache and a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cpinfer.attention.backends.base import StepBackends
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.engine.agreement import Prepared
from cpinfer.engine.decode_cuda_graphs import make_decode_graphs
from cpinfer.engine.exchanges import Exchanges
from cpinfer.engine.experts_reader import ExpertsReader
from cpinfer.engine.fingerprint import digest_of
from cpinfer.engine.layout_choice import DecodeLayout, LayoutChoice, measured_rates
from cpinfer.engine.logits_reader import LogitsReader
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step_attention import StepAttention
from cpinfer.engine.step_plans import StepPlanner
from cpinfer.engine.step_runner import StepRunner
from cpinfer.engine.step_states import StepStates
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.kv_cache.state_store import StateStore
from cpinfer.layout.decode_choice import DecodeRates
from cpinfer.layout.shards import KVSharding
from cpinfer.models.runner import ModelRunner


def make_scheduler(runner: ModelRunner, layout: DecodeLayout, config: EngineConfig) -> Scheduler:
    """A scheduler over homes of free blocks, as many as all ranks can afford."""
    grid = layout.topology.grid
    return Scheduler(
        layout.needs.empty_homes(
            grid.num_homes, row_ranks=grid.row_ranks, enable_prefix_caching=config.enable_prefix_caching
        ),
        layout.sharding,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        window=runner.spec.widest_window,
        max_kept_tokens=config.max_session_tokens,
        states=layout.needs.empty_state_cache(grid.pcp_size),
    )


def make_steps(
    runner: ModelRunner, layouts: Sequence[DecodeLayout], config: EngineConfig, stop_checker: StopChecker
) -> StepRunner:
    """The step runner of the first layout, with a KV pool and backends of its own, as the config asks for them.

    Those of the others stand beside it, over the same pool.
    """
    needs = layouts[0].needs
    runner.prepacked.pack()
    cache, store = needs.make_cache(runner, has_padding_block=config.cuda_graphs), needs.make_states(runner)
    backends = needs.make_backends(config, runner.device)

    def runner_of(layout: DecodeLayout, others: Mapping[int, StepRunner]) -> StepRunner:
        # Kernels of the deterministic mode know how many shards there are.
        own = layout.needs.make_backends(config, runner.device) if config.deterministic else backends
        return make_step_runner(
            runner, layout.topology, config, layout.sharding, own, cache, stop_checker, store, others
        )

    return runner_of(layouts[0], {layout.sharding.num_shards: runner_of(layout, {}) for layout in layouts[1:]})


def prepared_steps(
    awake: StepRunner | None,
    runner: ModelRunner,
    layouts: Sequence[DecodeLayout],
    config: EngineConfig,
    stop_checker: StopChecker,
) -> Prepared[StepRunner]:
    """`make_steps`, as ranks begin it together; `awake` where it was done. Its number: whether rates are known."""
    steps = awake or make_steps(runner, layouts, config, stop_checker)
    is_known = len(layouts) == 1 or _key(runner, config) in layouts[0].topology.measured
    return Prepared(steps, lambda: {"call": "wake"}, number=int(is_known))


def _key(runner: ModelRunner, config: EngineConfig) -> int:
    """By what a topology keeps rates of decode steps: those of another model, or config, may be others."""
    return digest_of({"model": runner.spec, "config": config})


def make_layout_choice(
    runner: ModelRunner, layouts: Sequence[DecodeLayout], config: EngineConfig, steps: StepRunner, *, is_known: bool
) -> LayoutChoice | None:
    """Who chooses between layouts, where there are several: by what their steps take.

    Which is measured here, collectively over the replica, unless all ranks know it of an engine before.
    """
    if len(layouts) == 1:
        return None
    topology, key = layouts[0].topology, _key(runner, config)
    if not is_known:
        topology.measured[key] = measured_rates(steps, layouts, runner, config.max_num_seqs)
    rates: Mapping[int, DecodeRates] = topology.measured[key]
    told = ", ".join(f"dcp={n} {1e3 * r.first_s:.2f} ms" for n, r in sorted(rates.items()))
    topology.logger(__name__).shared("a decode step of one row takes %s", told)
    return LayoutChoice(layouts, rates, lambda layout: make_scheduler(runner, layout, config))


def make_step_runner(
    runner: ModelRunner,
    topology: Topology,
    config: EngineConfig,
    sharding: KVSharding,
    backends: StepBackends,
    cache: PagedKVCache,
    stop_checker: StopChecker,
    store: StateStore | None = None,
    others: Mapping[int, StepRunner] = MappingProxyType({}),
) -> StepRunner:
    """The step runner of one rank. Every rank makes the same decisions here, but for its place in the grid.

    `store`: of a model that has states. `others` as `StepRunner` has them.
    """
    grid, spec = topology.grid, runner.spec
    heads = spec.heads(grid.tp_size).in_group(grid, topology.coords.tp_rank)
    exchanges = Exchanges.of(topology, heads, config, runner.dtype)
    graphs = None
    if config.cuda_graphs:
        max_rows = -(-config.max_num_seqs // exchanges.row_ranks)
        graphs = make_decode_graphs(
            runner, topology.replica, backends.decode, cache, exchanges.decode, heads, sharding, max_rows
        )
    attention = StepAttention(spec, config, heads, exchanges, backends, cache)
    min_saved_keys = {"auto": backends.decode.min_saved_keys, "on": 0, "off": None}[config.cascade_attention]
    ordered = f"deterministic, {config.deterministic_kv_shards} virtual KV shards"
    topology.logger(__name__).shared(
        "attention by %s (%s, device %s), cascade_attention %s, CUDA graphs %s, decode with dcp=%d",
        backends.prefill.name, ordered if config.deterministic else f"backend is {config.backend!r}", runner.device,
        "off" if min_saved_keys is None else config.cascade_attention, "off" if graphs is None else "on",
        grid.dcp_size,
    )  # fmt: skip
    planner = StepPlanner(
        grid,
        topology.rank,
        sharding,
        shard=topology.kv_shard,
        row_ranks=exchanges.row_ranks,
        in_buckets=graphs is not None,
        windows=spec.windows,
        pairs_per_token=spec.pairs_per_token,
        kv_layout=cache.layout,
        min_saved_keys=None if graphs is not None else min_saved_keys,  # what is captured reads rows as they are
        num_tail=None if spec.states is None else spec.states.num_tail,
    )
    reader = LogitsReader(topology, runner.device, stop_checker, as_trained=config.deterministic)
    states = None if store is None else StepStates(store, topology.pcp)
    return StepRunner(
        runner, cache, planner, attention, reader, ExpertsReader(topology, runner), graphs, states, others
    )
