"""In which layout an engine's next requests decode, where the config leaves it open: dcp = pcp, or a home per rank.

    start    decode steps are measured in either layout, the slowest rank's times told to all
    at rest  the requests that wait are dealt in thought, and each layout's phase is predicted: all ranks choose alike
    switch   other homes over the same memory: nothing that was cached is where it was

Nothing is chosen while requests are under way, but where one comes that only the shards of all ranks can hold: then
those under way are computed anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import NamedTuple

import torch

from cpinfer.comm.axis import AxisComm
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig, ParallelConfig, SamplingParams
from cpinfer.engine.known_prefixes import KnownPrefixes
from cpinfer.engine.needs import RankNeeds
from cpinfer.engine.request import Prompt, Request, SampledRequest, SampledToken
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step_runner import StepRunner
from cpinfer.kv_cache.state_pool import StateSlot
from cpinfer.layout.decode_choice import DecodeRates, phase_seconds
from cpinfer.layout.shards import KVSharding
from cpinfer.models.runner import ModelRunner

# What is not this much faster is not worth collectives in every layer, which wait for the slowest rank, nor the cache.
WORTH_IT = 0.97
# What is measured: rows of each rank, keys of a row, and how often. With 4,096 keys, five times in a row, a key came
# out at 0.25 to 0.72 us where decode steps took 0.4.
_MANY_ROWS, _MANY_KEYS, _NUM_ROUNDS = 8, 16384, 10


@dataclass(frozen=True)
class DecodeLayout:
    """One way to decode: a rank's place in it, and what it needs there."""

    topology: Topology
    needs: RankNeeds

    @property
    def sharding(self) -> KVSharding:
        return self.needs.pool_size.sharding


def decode_layouts(topology: Topology, config: EngineConfig, needs: RankNeeds) -> tuple[DecodeLayout, ...]:
    """The topology's own, and where the config leaves it open the one without shards, of as many blocks a rank."""
    own = DecodeLayout(topology, needs)
    if not is_open(config) or topology.grid.dcp_size == 1:
        return (own,)
    pool = replace(needs.pool_size, sharding=replace(own.sharding, num_shards=1))
    return own, DecodeLayout(topology.unsharded(), replace(needs, pool_size=pool))


def is_open(config: object) -> bool:
    """Whether the config leaves dcp to the engine."""
    return isinstance(config, ParallelConfig) and config.decode_context_parallel_size == "auto"


class LayoutChoice:
    """Chooses between `layouts`; `empty` makes a scheduler of one, which goes on counting for the one before."""

    def __init__(
        self,
        layouts: Sequence[DecodeLayout],
        rates: Mapping[int, DecodeRates],
        empty: Callable[[DecodeLayout], Scheduler],
    ) -> None:
        self._layouts = {layout.sharding.num_shards: layout for layout in layouts}
        self._rates = rates
        self._empty = empty
        # Of answers that may end by themselves: tokens that they had, and might have had.
        self._num_generated = self._num_allowed = 0

    def home(self, scheduler: Scheduler) -> int:
        """That of this rank."""
        topology = self._layouts[scheduler.sharding.num_shards].topology
        return topology.grid.home(topology.rank)

    def note(self, finished: Iterable[Request]) -> None:
        """Take note of answers that have ended: others are expected to be as long, relative to what they may be."""
        for request in finished:
            if isinstance(request, SampledRequest) and not request.params.ignore_eos:
                self._num_generated += len(request.sampled)
                self._num_allowed += request.max_new_tokens

    def for_next(self, scheduler: Scheduler) -> Scheduler:
        """The scheduler, or one of another layout with the same requests, none of which is under way."""
        waiting, current = scheduler.waiting, scheduler.sharding.num_shards
        if scheduler.keeps_any:  # sessions would lose their KV, whose worth nobody knows
            return scheduler
        roomy = [n for n, layout in self._layouts.items() if self._has_room(layout, waiting, scheduler.max_num_seqs)]
        seconds = {n: self._seconds(n, waiting, scheduler.max_num_seqs) for n in roomy or [max(self._layouts)]}
        best, fewest = min(sorted(seconds), key=lambda n: seconds[n]), min(seconds)
        if seconds[best] >= WORTH_IT * seconds[fewest]:
            best = fewest
        if current in seconds and (num_remembered := _num_remembered(scheduler)):
            # Of what is cached each token would be one more row, shared by all ranks.
            lost_s = self._rates[current].row_s * num_remembered / max(self._layouts)
            if seconds[best] + lost_s >= WORTH_IT * seconds[current]:
                return scheduler
        return self._switched(scheduler, best)

    def holding(self, scheduler: Scheduler, request: Request) -> Scheduler:
        """The scheduler, or where its homes are too small for a request one of the largest, all else computed anew."""
        if _is_held(scheduler.sharding, scheduler.homes[0].pool.num_blocks, request):
            return scheduler
        return self._switched(scheduler, max(self._layouts))

    def _switched(self, scheduler: Scheduler, num_shards: int) -> Scheduler:
        if num_shards == scheduler.sharding.num_shards:
            return scheduler
        layout = self._layouts[num_shards]
        layout.topology.logger(__name__).shared(
            "%d request(s) decode with dcp=%d from here on", scheduler.num_unfinished, num_shards
        )
        anew = self._empty(layout)
        anew.stats = scheduler.stats
        return scheduler.restarted(None, into=anew)

    def _seconds(self, num_shards: int, waiting: Sequence[Request], max_num_seqs: int) -> float:
        samples = [request for request in waiting if isinstance(request, SampledRequest)]
        return phase_seconds(
            self._rates[num_shards],
            [request.num_tokens for request in samples],
            [self._expected(request) for request in samples],
            num_homes=max(self._layouts) // num_shards,
            num_shards=num_shards,
            max_num_seqs=max_num_seqs,
        )

    def _expected(self, request: SampledRequest) -> int:
        left = request.max_new_tokens - len(request.sampled)
        if request.params.ignore_eos or not self._num_allowed:
            return left
        return ceil(left * self._num_generated / self._num_allowed)

    def _has_room(self, layout: DecodeLayout, waiting: Sequence[Request], max_num_seqs: int) -> bool:
        """Whether homes hold all that would run at once, what samples of a prompt share counted once in each."""
        sharding, pool = layout.sharding, layout.needs.pool_size
        if not all(_is_held(sharding, pool.num_blocks, request) for request in waiting):
            return False
        num_homes = layout.topology.grid.num_homes
        taken, shared = [0] * num_homes, [set[int]() for _ in range(num_homes)]
        for i, request in enumerate(waiting[:max_num_seqs]):
            home, prompt = i % num_homes, request.prompt
            num_shared = sharding.num_immutable_blocks(len(prompt.token_ids))
            taken[home] += sharding.num_blocks(request.max_cached_tokens)
            taken[home] -= num_shared if id(prompt) in shared[home] else 0
            shared[home].add(id(prompt))
        return max(taken) <= pool.num_blocks


def _is_held(sharding: KVSharding, num_blocks: int, request: Request) -> bool:
    return sharding.num_blocks(request.max_cached_tokens) <= num_blocks


def _num_remembered(scheduler: Scheduler) -> int:
    """Tokens of prompts that wait that some home remembers."""
    prefixes = KnownPrefixes(scheduler.homes, scheduler.sharding)
    if not any(len(home.prefixes) for home in scheduler.homes):
        return 0
    found = 0
    for request in {id(request.prompt): request for request in scheduler.waiting}.values():
        keys = prefixes.keys(request, request.first_logits_place)
        found += max(prefixes.num_tokens(prefixes.remembered(request, keys, [h])) for h in range(len(scheduler.homes)))
    return found


class _Rehearsed(NamedTuple):
    """The steps by which a layout is measured: of one row of each home, of `num_rows` of each rank, over `num_keys`."""

    one: list[SampledRequest]
    rows: list[SampledRequest]
    keys: list[SampledRequest]
    num_rows: int
    num_keys: int

    @classmethod
    def of(cls, layout: DecodeLayout, max_positions: int, max_num_seqs: int) -> _Rehearsed:
        """What the pool, the model and the scheduler have room for. Of one row or key nothing is learnt."""
        num_ranks, num_shards = layout.topology.grid.pcp_size, layout.sharding.num_shards
        num_blocks, num_alone = layout.needs.pool_size.num_blocks, 1 if num_shards > 1 else num_ranks
        num_rows = max(1, min(_MANY_ROWS, num_blocks // num_ranks, max_num_seqs // num_ranks))
        num_keys = min(_MANY_KEYS, (num_blocks - 1) * layout.sharding.block_size, (max_positions - 1) // num_shards)
        return cls(
            _rows_of(layout, num_alone, 0),
            _rows_of(layout, min(num_rows * num_ranks, num_blocks * layout.topology.grid.num_homes), 0),
            _rows_of(layout, num_alone, num_keys * num_shards),
            num_rows,
            num_keys,
        )


def measured_rates(
    steps: StepRunner, layouts: Sequence[DecodeLayout], runner: ModelRunner, max_num_seqs: int
) -> dict[int, DecodeRates]:
    """What decode steps take in each layout, the same on every rank.

    Of a cache in which nothing is kept yet. Collective over the replica. Steps of all kinds take turns, so that what
    slows the machine for a while slows all of them; of each the fastest counts, by the rank that was the longest at it.
    """
    replica, rehearsed = layouts[0].topology.replica, {}
    for layout in layouts:
        rehearsed[layout.sharding.num_shards] = _Rehearsed.of(layout, runner.spec.max_positions, max_num_seqs)
    # What was never written costs less to read: the system has one page of zeros for all of it.
    rows = [row for r in rehearsed.values() for row in (*r.one, *r.rows, *r.keys)]
    steps.clear_cache(1 + max(max(row.blocks) for row in rows))
    fastest = {num_shards: [inf] * 3 for num_shards in rehearsed}
    for _ in range(_NUM_ROUNDS):
        for num_shards, r in rehearsed.items():
            for i, requests in enumerate((r.one, r.rows, r.keys)):
                seconds = _longest(replica, _seconds_of(steps.over(num_shards), requests), runner.device)
                fastest[num_shards][i] = min(fastest[num_shards][i], seconds)
    steps.end()
    return {
        num_shards: DecodeRates.through(
            one, (rehearsed[num_shards].num_rows, many), (rehearsed[num_shards].num_keys, keys)
        )
        for num_shards, (one, many, keys) in fastest.items()
    }


def _rows_of(layout: DecodeLayout, num_rows: int, context: int) -> list[SampledRequest]:
    """Running sequences of so many tokens before the newest, dealt to homes in turn, of blocks of their own."""
    grid, needed = layout.topology.grid, layout.sharding.num_blocks(context + 1)
    requests = []
    for i in range(num_rows):
        index, home = divmod(i, grid.num_homes)
        request = SampledRequest(Prompt(i, str(i), (0,) * context), 0, SamplingParams(), 1)
        request.sampled.append(SampledToken(0, 0.0, 0.0))
        request.home, request.blocks = home, list(range(index * needed, (index + 1) * needed))
        request.state = StateSlot(index % grid.row_ranks, index // grid.row_ranks)
        requests.append(request)
    return requests


def _seconds_of(runner: StepRunner, requests: Sequence[SampledRequest]) -> float:
    start_s = time.perf_counter()
    runner.rehearse(requests)
    return time.perf_counter() - start_s


def _longest(replica: AxisComm, seconds: float, device: torch.device) -> float:
    told = replica.all_gather(torch.tensor([seconds], dtype=torch.float32, device=device))
    return float(told.max())
