"""One scheduled step on this rank: plan it, run the model, sample, and agree with the other ranks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, FixedSizeBackend
from cpinfer.attention.cascade import plan_sharing
from cpinfer.attention.context import ContextAttention, KVContext, QueryContext, WindowContext
from cpinfer.attention.exchange import StateExchange
from cpinfer.attention.steps import AttentionStep, DecodeStep, IdleStep, PrefillStep
from cpinfer.comm.topology import Topology
from cpinfer.config import Config
from cpinfer.engine.agreement import agree_on_scores, agree_on_tokens, smallest
from cpinfer.engine.decode_graphs import DecodeGraphs, why_no_graphs
from cpinfer.engine.request import SampledToken, Sequence, TokenScore
from cpinfer.engine.sampling import sample_tokens, score_tokens
from cpinfer.engine.scheduler import Chunk, Scheduler, Step
from cpinfer.engine.stopping import Stopping
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.context import (
    Context,
    StepContext,
    choose_exchange,
    exchange_places,
    plan_kv_exchange,
    plan_query_exchange,
    plan_window_exchange,
)
from cpinfer.layout.decode import bucket_of, plan_decode, rows_in_window
from cpinfer.layout.prefill import (
    PrefillPlan,
    ScoredRows,
    StepCost,
    deal_prompts,
    plan_prefill,
    plan_scored_rows,
    split_prompts,
)
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import IntArray, KVSharding
from cpinfer.logs import RankLogger
from cpinfer.models.runner import ModelRunner


@dataclass(frozen=True)
class StepOutput:
    """The tokens of `step.samples`, and the scores of its chunks' `scored_places`, one after another."""

    sampled: list[SampledToken]
    scores: ListLike[TokenScore] = ()


# Who computed a token: its pcp rank, and the row of that rank's record.
TokenPlace = tuple[int, int]


class StepRunner:
    """Runs steps on one rank. What it decides, it decides from what all ranks know."""

    def __init__(
        self,
        runner: ModelRunner,
        topology: Topology,
        config: Config,
        sharding: KVSharding,
        backend: AttentionBackend,
        cache: PagedKVCache,
        stopping: Stopping,
    ) -> None:
        grid, spec = topology.grid, runner.spec
        self._runner = runner
        self._topology = topology
        self._config = config
        self._sharding = sharding
        self._backend = backend
        self._cache = cache
        self._stopping = stopping
        self._log = RankLogger(__name__, topology.rank, grid.world_size, speaks=topology.is_writer)
        self._cost = StepCost(pairs_per_token=spec.pairs_per_token)
        # In a fixed order: every rank gathers for one window after the other.
        self._windows = sorted({w for w in spec.windows if w is not None})
        self._has_full_layers = spec.widest_window is None
        self._heads = spec.heads(grid.tp_size).in_group(grid, topology.coords.tp_rank)
        # New K/V of a prefill go to all who store them or attend to them: beyond the pcp axis where heads are mixed.
        self._prefill_comm = topology.dcp if self._heads.is_mixed else topology.pcp
        self._home = grid.home(topology.rank)
        wire_dtype = runner.dtype if config.cp_wire_dtype == "auto" else getattr(torch, config.cp_wire_dtype)
        state_return = config.decode_exchange
        # With replicated queries a decode row is computed by every rank of the home, so rows are dealt to one place.
        self._row_ranks = 1 if state_return == "replicate_q" else grid.row_ranks
        self._decode_exchange = StateExchange(
            topology.dcp,
            pcp_size=self._row_ranks,
            wire_dtype=wire_dtype,
            state_return=state_return,
            kv_columns=self._heads.columns,
        )
        self._min_saved_keys = {"auto": backend.min_saved_keys, "on": 0, "off": None}[config.cascade_attention]
        self._graphs = self._decode_graphs() if config.cuda_graphs else None
        self._log.shared(
            "attention by %s (backend is %r, device %s), cascade from %s saved keys on, decode graphs %s",
            backend.name, config.backend, runner.device, self._min_saved_keys, "on" if self._graphs else "off",
        )  # fmt: skip
        self._places = exchange_places(grid, topology.rank)
        self._context_comm = topology.pcp if grid.context_runs_over_pcp else topology.dcp
        self._context_exchange = StateExchange(
            self._context_comm,
            pcp_size=grid.pcp_size,
            wire_dtype=wire_dtype,
            state_return="a2a" if state_return == "replicate_q" else state_return,
        )

    def _decode_graphs(self) -> DecodeGraphs | None:
        layerwise = self._config.rollout.gather == "layerwise"
        why_not = why_no_graphs(self._runner, self._backend, layerwise=layerwise)
        if why_not is not None or not isinstance(self._backend, FixedSizeBackend):
            warnings.warn(f"decode runs without CUDA graphs: {why_not}", stacklevel=2)
            return None
        max_rows = bucket_of(-(-self._config.max_num_seqs // self._row_ranks))
        return DecodeGraphs(
            self._runner, self._backend, self._cache, self._decode_exchange, self._heads, self._sharding, max_rows
        )

    def begin(self) -> None:
        """Before the first of many steps. Graphs of weights that have moved, on any rank, are forgotten by all."""
        if self._graphs is not None:
            moved, topology = self._graphs.weights_moved(), self._topology
            if smallest(topology.replica, -int(moved), self._runner.device) < 0:
                self._graphs.forget()

    def weights_changed(self) -> None:
        """Other adapters may be other modules: what was captured without them says nothing of them."""
        self._cache.forget_faults()
        if self._graphs is not None:
            self._graphs.forget()

    def clear_cache(self) -> None:
        """Nothing of what is cached will be read again, and something in it is not finite."""
        self._cache.clear()

    def run(self, step: Step, *, leaves: bool = False) -> StepOutput:
        """What `step` samples and scores, the same on every rank. `leaves`: this rank takes no more results."""
        if self._log.isEnabledFor(logging.DEBUG):
            num_tokens = sum(chunk.end - chunk.start for chunk in step.chunks) or len(step.running)
            self._log.debug(
                "step: %d chunk(s), %d running, %d token(s)", len(step.chunks), len(step.running), num_tokens
            )
        if step.chunks:
            return self._prefill(step.chunks, step.samples, leaves)
        return StepOutput(self._decode(step.running, leaves))

    def tell_end(self, scheduler: Scheduler) -> None:
        """Log what a run came to."""
        stats = scheduler.stats
        self._log.shared(
            "done: %d tokens generated, %d of prompts computed and %d found cached; %d preemption(s); %d prefix "
            "unit(s) evicted since the engine began",
            stats.num_generated_tokens, stats.num_computed_prefill_tokens, stats.num_cached_prefill_tokens,
            stats.num_preemptions, sum(home.prefixes.num_evicted_units for home in scheduler.homes),
        )  # fmt: skip

    def copy_blocks(self, pairs: ListLike[tuple[int, int]]) -> None:
        """Copy KV blocks of this rank's home, (from, to)."""
        self._cache.copy_blocks(pairs)

    def _prefill(self, chunks: ListLike[Chunk], samples: ListLike[Sequence], leaves: bool) -> StepOutput:
        pcp_size, pcp_rank = self._topology.grid.pcp_size, self._topology.coords.pcp_rank
        starts = [chunk.start for chunk in chunks]
        lens = [chunk.end - chunk.start for chunk in chunks]
        split = split_prompts(lens, pcp_size, dealt=deal_prompts(lens, pcp_size, self._cost, starts))
        leaders = [chunk.prefill.leaders.get(self._home) for chunk in chunks]
        plan = plan_prefill(
            split,
            [None if leader is None else leader.blocks for leader in leaders],
            self._sharding,
            pcp_rank=pcp_rank,
            shard=self._topology.kv_shard,
            context_lens=starts,
        )
        attention = self._prefill_attention(plan, chunks)
        token_ids = [
            token
            for piece in plan.pieces
            for token in chunks[piece.prompt].prefill.token_ids[
                starts[piece.prompt] + piece.start : starts[piece.prompt] + piece.end
            ]
        ]
        last = [i for i, chunk in enumerate(chunks) if chunk.samples]
        mine = [i for i in last if plan.sample_rows[i] >= 0]
        scored = plan_scored_rows(plan, [chunk.scored_places for chunk in chunks], starts)
        logits = self._forward(token_ids, plan.positions, attention, [*plan.sample_rows[mine].tolist(), *scored.rows])
        # Samples that share a prefill are all drawn from the logits of its last token.
        drawn = [(row, sample) for row, i in enumerate(mine) for sample in chunks[i].prefill.samples]
        owners = [int(plan.sample_owner[i]) for i in last for _ in chunks[i].prefill.samples]
        rows = {owner: count() for owner in owners}
        places = [(owner, next(rows[owner])) for owner in owners]
        return StepOutput(
            self._sample(logits[[row for row, _ in drawn]], [sample for _, sample in drawn], samples, places, leaves),
            self._score(logits[len(mine) :], chunks, scored, leaves),
        )

    def _score(self, logits: Tensor, chunks: ListLike[Chunk], scored: ScoredRows, leaves: bool) -> list[TokenScore]:
        """The scores of all `scored_places`, from this rank's rows of them."""
        own: ListLike[TokenScore | None] = []
        if not bool(torch.isfinite(logits).all()):
            own = [None] * len(logits)
        elif self._topology.coords.tp_rank == 0:
            targets = []
            for i, place in scored.own:
                sequence = chunks[i].prefill.samples[0]
                targets.append(sequence.targets[place - chunks[i].prefill.first_scored])
            own = score_tokens(logits, targets)
        topology, device = self._topology, self._runner.device
        return agree_on_scores(topology.replica, topology.grid.tp_size, scored.places, own, device, leaves=leaves)

    def _prefill_attention(self, plan: PrefillPlan, chunks: ListLike[Chunk]) -> PrefillStep:
        """The attention of a prefill step, with what earlier steps cached of its prompts."""
        rows: dict[int | None, AttentionRows] = {None: plan.rows} if self._has_full_layers else {}
        context, window_contexts = None, {}
        step = StepContext(plan.split, [_context_of(chunk) for chunk in chunks], self._sharding, self._places)
        has_context = any(chunk.start for chunk in chunks)
        if has_context and self._has_full_layers:
            context = self._full_context(step)
        for window in self._windows:
            if not has_context:
                rows[window] = plan.rows.within(window)
                continue
            exchange = plan_window_exchange(step, self._context_comm.index, window)
            rows[window] = exchange.rows
            window_contexts[window] = WindowContext(exchange, self._cache, self._context_comm, self._heads)
        return PrefillStep(
            plan, rows, self._backend, self._cache, self._prefill_comm, self._heads, context, window_contexts
        )

    def _full_context(self, step: StepContext) -> ContextAttention:
        """Attention to all that is cached, by whatever moves fewer bytes, or computes less."""
        exchange, latent = self._config.context_exchange, self._runner.spec.latent
        if exchange == "auto":
            exchange = choose_exchange(
                step,
                q_heads=self._heads.num_q_heads,
                kv=self._cache.layout,
                dtype_bytes=self._runner.dtype.itemsize,
                max_absorbed_queries=None if latent is None else latent.max_absorbed_queries,
            )
        index = self._context_comm.index
        if exchange == "queries":
            query_plan = plan_query_exchange(step, index)
            return QueryContext(query_plan, self._backend, self._cache, self._context_exchange, self._heads)
        workspace_tokens = self._config.context_workspace_tokens
        if latent is not None:  # expanded they are many times larger: no more at a time than new tokens are
            workspace_tokens = min(workspace_tokens, self._config.max_num_batched_tokens)
        kv_plan = plan_kv_exchange(step, index, workspace_tokens)
        return KVContext(kv_plan, self._backend, self._cache, self._context_comm, self._heads)

    def _decode(self, running: ListLike[Sequence], leaves: bool) -> list[SampledToken]:
        grid = self._topology.grid
        by_home = [[s for s in running if s.home == home] for home in range(grid.num_homes)]
        here = by_home[self._home]
        places = self._decode_places(by_home)
        if not here:
            logits = self._forward([], [], IdleStep(), [])
            return self._sample(logits, [], running, [places[id(s)] for s in running], leaves)
        positions, shard = [s.next_position for s in here], self._topology.kv_shard
        plan = plan_decode(
            positions,
            [s.blocks for s in here],
            self._sharding,
            pcp_size=self._row_ranks,
            pcp_rank=self._topology.coords.pcp_rank % self._row_ranks,
            shard=shard,
            rows_per_rank=self._rows_per_rank(len(here)),
        )
        rows: dict[int | None, AttentionRows] = {None: plan.rows} if self._has_full_layers else {}
        for window in self._windows:
            rows[window] = rows_in_window(plan, positions, self._sharding, shard, window)
        mine = [here[i] for i in plan.own if i >= 0]
        tokens = [s.last_token_id for s in mine]
        if self._graphs is not None:
            logits = self._graphs.forward(plan, rows, tokens)
        else:
            planned = {
                window: plan_sharing(self._backend, r, self._min_saved_keys if window is None else None)
                for window, r in rows.items()
            }
            attention = DecodeStep(plan, planned, self._cache, self._decode_exchange, self._heads)
            padding = [0] * (len(plan.own) - len(mine))
            logits = self._forward(tokens + padding, plan.positions, attention, range(len(mine)))
        return self._sample(logits, mine, running, [places[id(s)] for s in running], leaves)

    def _decode_places(self, by_home: ListLike[ListLike[Sequence]]) -> dict[int, TokenPlace]:
        """Who computes each running sequence, by `id`."""
        places = {}
        for home, sequences in enumerate(by_home):
            rows_per_rank = self._rows_per_rank(len(sequences))
            for i, sequence in enumerate(sequences):  # neighbours on each rank, as `deal_rows` has them
                pcp_rank, record = divmod(i, rows_per_rank)
                places[id(sequence)] = (home * self._topology.grid.row_ranks + pcp_rank, record)
        return places

    def _rows_per_rank(self, num_rows: int) -> int:
        """As few as hold them; where steps are replayed, as many as a step that is captured."""
        needed = -(-num_rows // self._row_ranks)
        return needed if self._graphs is None else bucket_of(needed)

    def _forward(
        self,
        token_ids: ListLike[int],
        positions: IntArray | ListLike[int],
        attention: AttentionStep,
        keep: IntArray | ListLike[int],
    ) -> Tensor:
        """`[len(keep), vocab]` logits. Models crash on zero rows, so where there is none a dummy is computed."""
        has_tokens, has_keep = len(token_ids) > 0, len(keep) > 0
        logits = self._runner.forward(
            self._tensor(token_ids if has_tokens else [0]),
            self._tensor(positions if has_tokens else [0]),
            attention,
            self._tensor(keep if has_keep else [0]),
        )
        return logits[: len(keep)]

    def _sample(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        samples: ListLike[Sequence],
        places: ListLike[TokenPlace],
        leaves: bool,
    ) -> list[SampledToken]:
        """Sample this rank's rows, `sequences`, where it is their authority; learn the tokens of all `samples`."""
        own: ListLike[SampledToken | None] = []
        if not bool(torch.isfinite(logits).all()):
            own = [None] * len(sequences)
        elif self._topology.coords.tp_rank == 0:
            own = sample_tokens(logits, sequences, self._stopping)
        topology, device = self._topology, self._runner.device
        num_top = max((s.params.top_logprobs for s in samples), default=0)
        return agree_on_tokens(topology.replica, topology.grid.tp_size, places, own, device, num_top, leaves=leaves)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self._runner.device)


def _context_of(chunk: Chunk) -> Context:
    home, leader = next(iter(chunk.prefill.leaders.items()))
    return Context(chunk.start, home, leader.blocks)
