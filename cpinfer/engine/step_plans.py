"""What a step computes on one rank, and who computes what all ranks wait for: plans in numpy, made from what all know.

chunks of prefills, or running requests  ->  token ids and positions of this rank  |  layout plans for attention
                                         ->  rows whose logits are read, here and on other ranks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from operator import is_

import numpy as np

from cpinfer.engine.request import Request, SampledRequest
from cpinfer.engine.step import Chunk
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import Context, StepContext, exchange_places
from cpinfer.layout.decode import (
    DecodePlan,
    assign_rows,
    cuda_graph_batch_size,
    plan_decode,
    plan_next_decode,
    rows_in_window,
)
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.prefill import (
    PrefillPlan,
    PrefillSplit,
    ScoredRows,
    StepCost,
    assign_prompts,
    plan_prefill,
    plan_scored_rows,
    zigzag_split,
)
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import IntArray, KVSharding
from cpinfer.layout.shared_prefix import SharedPrefix, share_where_it_saves
from cpinfer.layout.states import PromptStates, StatePlace, StatePlan, plan_states
from cpinfer.layout.told_rows import ToldRows


@dataclass(frozen=True)
class PrefillInput:
    """A prefill step on one rank: `token_ids` at `plan.positions`, behind what `context` says is cached.

    `sampled_rows` of the model's rows are sampled from, request i of `requests` from the `drawn[i]`-th of them; and
    those of `scored` are asked for `targets`. `places`: who computed each token that the step samples, on any rank:
    (pcp rank, row there). `told`: all whose experts are asked for, None where none are. `states`: of a model that has
    them.
    """

    plan: PrefillPlan
    context: StepContext
    token_ids: list[int]
    sampled_rows: list[int]
    drawn: list[int]
    requests: list[SampledRequest]
    places: list[tuple[int, int]]
    scored: ScoredRows
    targets: list[int]
    told: ToldRows | None
    states: StatePlan | None = None

    @property
    def kept_rows(self) -> list[int]:
        """Rows whose logits are computed: those that are sampled from, and behind them those that score."""
        return [*self.sampled_rows, *self.scored.rows]


@dataclass(frozen=True)
class DecodeInput:
    """A decode step on one rank: the newest tokens of its `requests`, and keys for the layers of every window.

    Without a plan its home has no request. `places [N, 2]`: who computes each token that the step samples, on any rank:
    (pcp rank, row there). `told`: all whose experts are asked for, None where none are. `cut`: rows without a window,
    where they attend together to what they share. `state_slots`: where the states of `requests` lie, of a model that
    has them.
    """

    plan: DecodePlan | None
    rows: Mapping[int | None, AttentionRows]
    requests: list[SampledRequest]
    places: IntArray
    told: ToldRows | None
    cut: SharedPrefix | None = None

    @property
    def token_ids(self) -> list[int]:
        return [request.last_token_id for request in self.requests]

    @property
    def state_slots(self) -> list[int]:
        return [request.state.slot for request in self.requests if request.state is not None]


class StepPlanner:
    """Plans steps for one rank. Decode rows are dealt over `row_ranks` of a home; `in_buckets`: padded to few sizes.

    `windows`: of the model's layers, how many of the last tokens each sees; `pairs_per_token` as `StepCost` has it.
    `kv_layout`: of what decode rows attend to, the cache; `min_saved_keys` as `plan_cascade` has it. `num_tail`: of a
    model with states, how many inputs come before a token in its convolutions.
    """

    def __init__(
        self,
        grid: RankGrid,
        rank: int,
        sharding: KVSharding,
        *,
        shard: int,
        row_ranks: int,
        in_buckets: bool,
        windows: Sequence[int | None],
        pairs_per_token: int,
        kv_layout: KVLayout,
        min_saved_keys: int | None = None,
        num_tail: int | None = None,
    ) -> None:
        self._grid = grid
        self._pcp_rank = grid.coords(rank).pcp_rank
        self._home = grid.home(rank)
        self._shard = shard
        self._sharding = sharding
        self._row_ranks = row_ranks
        self._in_buckets = in_buckets
        # In a fixed order, the same on every rank.
        self._windows: list[int | None] = sorted(set(windows), key=lambda window: -1 if window is None else window)
        self._kv_layout = kv_layout
        self._min_saved_keys = min_saved_keys if None in windows else None
        self._num_tail = num_tail
        self._cost = StepCost(pairs_per_token=pairs_per_token)
        self._places = exchange_places(grid, rank)
        self._before: _PlannedDecode | None = None
        self._ahead: _PlannedDecode | None = None

    def prefill(self, chunks: Sequence[Chunk]) -> PrefillInput:
        """A step of chunks: split over the pcp axis, or dealt to its ranks whole."""
        pcp_size = self._grid.pcp_size
        starts = [chunk.start for chunk in chunks]
        lens = [chunk.end - chunk.start for chunk in chunks]
        split = zigzag_split(lens, pcp_size, assigned=assign_prompts(lens, pcp_size, self._cost, starts))
        leaders = [chunk.prefill.leaders.get(self._home) for chunk in chunks]
        plan = plan_prefill(
            split,
            [None if leader is None else leader.blocks for leader in leaders],
            self._sharding,
            pcp_rank=self._pcp_rank,
            shard=self._shard,
            context_lens=starts,
        )
        token_ids = [
            token
            for piece in plan.pieces
            for token in chunks[piece.prompt].prefill.token_ids[
                starts[piece.prompt] + piece.start : starts[piece.prompt] + piece.end
            ]
        ]
        samples = [chunk.samples for chunk in chunks]
        last = [i for i, own in enumerate(samples) if own]
        mine = [i for i in last if plan.sample_rows[i] >= 0]
        asking = [i for i, chunk in enumerate(chunks) if chunk.wants_experts]
        scored = plan_scored_rows(plan, [chunk.scored_positions for chunk in chunks], starts)
        # Samples that share a prefill are all drawn from the logits of its last token.
        drawn = [(row, sample) for row, i in enumerate(mine) for sample in samples[i]]
        owners = [int(plan.sample_owner[i]) for i in last for _ in samples[i]]
        rows = {owner: count() for owner in owners}
        return PrefillInput(
            plan=plan,
            context=StepContext(split, [_context_of(chunk) for chunk in chunks], self._sharding, self._places),
            token_ids=token_ids,
            sampled_rows=plan.sample_rows[mine].tolist(),
            drawn=[row for row, _ in drawn],
            requests=[sample for _, sample in drawn],
            places=[(owner, next(rows[owner])) for owner in owners],
            scored=scored,
            targets=[chunks[i].prefill.requests[0].target_at(place) for i, place in scored.own],
            told=ToldRows.of_prompts(split, asking) if asking else None,
            states=self._states(split, chunks),
        )

    def _states(self, split: PrefillSplit, chunks: Sequence[Chunk]) -> StatePlan | None:
        """Every request of a prefill has the state behind its last chunk, so that any of them can go on from it.

        A prefill that found a prefix begins with the state behind that.
        """
        if self._num_tail is None:
            return None
        prompts = []
        for chunk in chunks:
            own = tuple(map(self._state_place, chunk.prefill.requests))
            start = chunk.prefill.state_start or (own[0] if chunk.start else None)
            prompts.append(PromptStates(start, own if chunk.state_place is None else (*own, chunk.state_place)))
        return plan_states(split, prompts, pcp_rank=self._pcp_rank, num_tail=self._num_tail)

    def _state_place(self, request: Request) -> StatePlace:
        assert request.state is not None, "who is admitted has a place for its state"
        return StatePlace(request.home * self._grid.row_ranks + request.state.rank, request.state.slot)

    def decode(self, running: Sequence[SampledRequest]) -> DecodeInput:
        """A step of one token of every running request, each in its home.

        As a rule those of the decode step before run on, and so does its plan.
        """
        before, ahead, self._ahead = self._before, self._ahead, None
        if before is None or not before.goes_on(running):
            self._before = self._decode_anew(running)
        else:
            self._before = ahead or self._next(before)
        return self._before.input

    def plan_ahead(self) -> None:
        """Plan the step behind the last one, while that runs: as if all run on, in the blocks that they have.

        Where one will begin a block, which is not known yet, nothing is planned: of one row in a step of 16, of many
        that are out of step with each other in nearly all.
        """
        with suppress(IndexError):
            self._ahead = None if self._before is None else self._next(self._before)

    def forget(self) -> None:
        """No step is to go on: hold on to no request."""
        self._before = self._ahead = None

    def _decode_anew(self, running: Sequence[SampledRequest]) -> _PlannedDecode:
        homes = np.fromiter((r.home for r in running), dtype=np.int64, count=len(running))
        by_home = [np.flatnonzero(homes == home) for home in range(self._grid.num_homes)]
        here = [running[i] for i in by_home[self._home].tolist()]
        places = self._decode_places(running, by_home)
        asking = [i for i, request in enumerate(running) if request.experts is not None]
        told = ToldRows(*places[asking].T) if asking else None
        if not here:
            return _PlannedDecode.of(running, here, DecodeInput(None, {}, [], places, told))
        plan = plan_decode(
            [r.next_position for r in here],
            [r.packed_blocks for r in here],
            self._sharding,
            pcp_size=self._row_ranks,
            pcp_rank=self._pcp_rank % self._row_ranks,
            shard=self._shard,
            rows_per_rank=self._rows_per_rank(here),
            ranks=self._own_ranks(here),
        )
        plan = replace(plan, rows=plan.rows.over(self._kv_layout))
        own = [here[i] for i in plan.own if i >= 0]
        cut = share_where_it_saves(plan.rows, self._min_saved_keys)
        planned = DecodeInput(plan, self._rows_by_window(plan), own, places, told, cut)
        return _PlannedDecode.of(running, here, planned)

    def _next(self, before: _PlannedDecode) -> _PlannedDecode:
        """The step behind one that goes on."""
        last, cut, here = before.input.plan, before.input.cut, before.here
        if last is None:
            return before
        plan = plan_next_decode(
            last,
            [r.blocks for r in here],
            self._sharding,
            pcp_size=self._row_ranks,
            pcp_rank=self._pcp_rank % self._row_ranks,
            shard=self._shard,
        )
        cut = None if cut is None else cut.grown(last.rows, plan.rows)
        planned = replace(before.input, plan=plan, rows=self._rows_by_window(plan), cut=cut)
        return replace(before, num_sampled=[n + 1 for n in before.num_sampled], input=planned)

    def _rows_by_window(self, plan: DecodePlan) -> dict[int | None, AttentionRows]:
        return {
            window: plan.rows if window is None else rows_in_window(plan, self._sharding, self._shard, window)
            for window in self._windows
        }

    def _decode_places(self, running: Sequence[SampledRequest], by_home: Sequence[IntArray]) -> IntArray:
        """`[N, 2]`: who computes each running request; `by_home` are those of each home, as indices into all."""
        ranks, records = np.zeros((2, len(running)), dtype=np.int64)
        for home, members in enumerate(by_home):
            if not len(members):
                continue
            requests = [running[i] for i in members.tolist()]
            rows_per_rank = self._rows_per_rank(requests)
            rows = assign_rows(len(requests), self._row_ranks, rows_per_rank, self._own_ranks(requests))
            taken = np.flatnonzero(rows >= 0)
            pcp_rank, records[members[rows[taken]]] = np.divmod(taken, rows_per_rank)
            ranks[members[rows[taken]]] = home * self._grid.row_ranks + pcp_rank
        return np.stack((ranks, records), axis=1)

    def _own_ranks(self, requests: Sequence[SampledRequest]) -> list[int] | None:
        """The rank of a home that has the state of each request, None where they have none and may go anywhere."""
        if self._num_tail is None:
            return None
        return [request.state.rank for request in requests if request.state is not None]

    def _rows_per_rank(self, requests: Sequence[SampledRequest]) -> int:
        """As few as hold them; where steps are replayed, as many as a step that is captured."""
        ranks = self._own_ranks(requests)
        needed = -(-len(requests) // self._row_ranks) if ranks is None else max(map(ranks.count, set(ranks)))
        return cuda_graph_batch_size(needed) if self._in_buckets else needed


@dataclass(frozen=True)
class _PlannedDecode:
    """A decode step that was planned, and what it was planned from.

    `tables`: the lists of blocks of all `running`. `num_sampled`: tokens that those `here`, in this home, had then; no
    plan of this home depends on those of others.
    """

    running: Sequence[SampledRequest]
    here: list[SampledRequest]
    tables: list[list[int]]
    num_sampled: list[int]
    input: DecodeInput

    @classmethod
    def of(cls, running: Sequence[SampledRequest], here: list[SampledRequest], planned: DecodeInput) -> _PlannedDecode:
        """As these are now."""
        return cls(running, here, [r.blocks for r in running], [len(r.sampled) for r in here], planned)

    def goes_on(self, running: Sequence[SampledRequest]) -> bool:
        """Whether the same run now, a token further, in the blocks that they had. They may have got more.

        Who was put back and came again has another list of them, and may be in another home.
        """
        return (
            self.running == running
            and all(map(is_, self.tables, [request.blocks for request in running]))
            and [n + 1 for n in self.num_sampled] == [len(request.sampled) for request in self.here]
        )


def _context_of(chunk: Chunk) -> Context:
    home, leader = next(iter(chunk.prefill.leaders.items()))
    return Context(chunk.start, home, leader.blocks)
