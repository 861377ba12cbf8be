"""The core of an engine: all requests that it has, whoever asked for them, and the steps that advance them together."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cpinfer.comm.rank_watch import NoWatch, Watch
from cpinfer.engine.agreement import Says
from cpinfer.engine.layout_choice import LayoutChoice
from cpinfer.engine.request import Request, SampledRequest
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.scheduler_stats import SchedulerStats
from cpinfer.engine.step import Step
from cpinfer.engine.step_runner import StepRunner
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import EngineFaultError, StreamEndedError
from cpinfer.kv_cache.home import KVHome
from cpinfer.logs import RankLogger


@dataclass(eq=False)
class Batch:
    """Requests that are asked for together: how many are under way, and those that have ended and were not taken yet.

    `is_lost`: a step that failed took them with it.
    """

    requests: Sequence[Request]
    num_unfinished: int = 0
    finished: deque[Request] = field(default_factory=deque)
    is_lost: bool = False

    def take(self) -> Iterator[Request]:
        """Those that have ended since they were last taken, in the order in which they did."""
        while self.finished:
            yield self.finished.popleft()


class Load(NamedTuple):
    """What is under way at a time: samples that get tokens, others that are prefilled or wait, and all counts so far.

    `kv_usage`: the share of KV blocks that samples and cached prefixes hold.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    stats: SchedulerStats


class EngineCore:
    """Requests and steps on one rank of `num_ranks` that decide alike; one for an engine's life, awake or asleep.

    `is_cut` from the beginning of a step on until it has come to an end that all ranks know: where it never does, what
    the homes have written down of their blocks may be wrong. `left_alone`: what ended a batch here, where that could
    only be told to the others. It never holds on to a step runner, which owns the memory of the KV pool.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        stop_checker: StopChecker,
        home: int,
        num_ranks: int,
        log: RankLogger,
        watch: Watch = NoWatch(),
    ) -> None:
        self._scheduler = scheduler
        self._stop_checker = stop_checker
        self._home = home
        self._num_ranks = num_ranks
        self._log = log
        self._watch = watch
        self._num_steps = 0
        self._kinds_run: set[str] = set()
        # By `id` of each unfinished request, in the order in which they came.
        self._batches: dict[int, Batch] = {}
        self._is_at_rest = True
        self.is_cut = False
        self.left_alone: StreamEndedError | None = None
        # Where the layout of decode is open. It may bring another scheduler whenever nothing is under way.
        self.layouts: LayoutChoice | None = None

    @property
    def homes(self) -> Sequence[KVHome]:
        return self._scheduler.homes

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @property
    def load(self) -> Load:
        scheduler = self._scheduler  # the one of now: who asks may be another thread than the one that steps
        pools, num_running = [home.pool for home in scheduler.homes], len(scheduler.running)
        kv_usage = 1 - sum(pool.num_free for pool in pools) / sum(pool.num_blocks for pool in pools)
        return Load(num_running, max(0, scheduler.num_unfinished - num_running), kv_usage, replace(scheduler.stats))

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._scheduler.num_unfinished

    def submit(self, batch: Batch) -> None:
        """Queue the requests of a batch, on every rank the same between the same two steps."""
        with self.all_or_cut():
            for request in batch.requests:
                if self.layouts is not None:
                    self._scheduler = self.layouts.holding(self._scheduler, request)
                self._scheduler.add(request)
                self._batches[id(request)] = batch
                batch.num_unfinished += 1

    def advance(self, steps: StepRunner, says: Says = Says.NOTHING) -> Says | None:
        """Run the next step, and give the requests that it ended to their batches. Returns what ranks said with it.

        None where nobody was asked. EngineFaultError and StreamEndedError as steps raise them; what is under way is
        lost then.
        """
        assert not self.is_cut, "after a step that was cut the core has to be reset"
        with self.all_or_cut():
            if self._is_at_rest:
                if self.layouts is not None:
                    self._scheduler = self.layouts.for_next(self._scheduler)
                steps.begin()
                self._is_at_rest = False
            if self.layouts is not None:
                steps, self._home = steps.over(self._scheduler.sharding.num_shards), self.layouts.home(self._scheduler)
            try:
                step = self._scheduler.schedule()
                assert step is not None, "there is a request under way"
                finished, heard = self._run(steps, step, says)
            except EngineFaultError:
                steps.clear_cache()
                raise
            if self.layouts is not None:
                self.layouts.note(finished)
            for request in finished:
                batch = self._batches.pop(id(request))
                batch.num_unfinished -= 1
                batch.finished.append(request)
            self._rest_when_idle()
            if self._is_at_rest:
                steps.end()
        return heard

    def leave(self, batch: Batch, advance: Callable[[Says], object]) -> None:
        """Nobody takes what is left of a batch: tell the others, who may be in the next step of it already.

        Where all leave, all is well, and the batch's requests are aborted; where they do not, `left_alone` says so, and
        what is under way is lost. `advance` as `halt` has it.
        """
        try:
            self.halt(advance, batch)
        except StreamEndedError as ended:
            self.left_alone = ended
            return
        if not self.is_cut:
            self.abort([request for request in batch.requests if id(request) in self._batches])

    def halt(self, advance: Callable[[Says], object], batch: Batch | None = None) -> None:
        """Take no more steps for a batch, or for anything, and see to it that no rank does.

        `advance` takes part in whatever the others may be about to do; this rank does up to the first that it can say
        so in. Where all halt, all requests are where they were; StreamEndedError where they do not, and what is under
        way is lost.
        """
        try:
            while self._num_ranks > 1 and not self.is_cut and (batch is None or batch.num_unfinished):
                advance(Says.LEAVES)
        except StreamEndedError as ended:
            if len(ended.places) < self._num_ranks:
                raise
            # Nothing has been committed on any rank. To write KV again is to write the same; states have gone on.
            if any(home.states is not None for home in self.homes):
                self._scheduler = self._scheduler.restarted(None)
            self.is_cut = False

    def abort(self, requests: Sequence[Request]) -> None:
        """End unfinished requests where they are, on every rank between the same two steps; their blocks are free."""
        with self.all_or_cut():
            self._scheduler.abort(requests)
            for request in requests:
                self._batches.pop(id(request)).num_unfinished -= 1
            self._rest_when_idle()

    def open_batches(self) -> list[Batch]:
        """Batches with requests under way, in the order in which they came."""
        return list(dict.fromkeys(self._batches.values()))

    def reset(self) -> None:
        """Lose all requests, and what the homes remember: the way on from a step that was cut."""
        # All at once, so that an interrupt finds either.
        self._scheduler = self._scheduler.emptied()
        for batch in self._batches.values():
            batch.is_lost = True
        self._batches, self._is_at_rest, self.is_cut = {}, True, False

    def restart(self, version: int) -> None:
        """Drop all KV, as weights of `version` made it; requests under way are computed anew."""
        with self.all_or_cut():
            self._scheduler = self._scheduler.restarted(version)

    def let_go(self, request: SampledRequest) -> None:
        """Free what is kept of a request that has ended, on every rank between the same two steps."""
        with self.all_or_cut():
            self._scheduler.let_go(request)

    @contextmanager
    def all_or_cut(self) -> Iterator[None]:
        """A block after which the core is what it was, or cut, where it does not come to its end."""
        was_cut, self.is_cut = self.is_cut, True
        yield
        self.is_cut = was_cut

    def _run(self, steps: StepRunner, step: Step, says: Says) -> tuple[list[Request], Says | None]:
        """Run a step and take note of it; the requests that it finished, and what ranks said."""
        if self._log.isEnabledFor(logging.DEBUG):
            num_tokens = sum(chunk.end - chunk.start for chunk in step.chunks) or len(step.running)
            self._log.debug(
                "step: %d chunk(s), %d running, %d token(s)", len(step.chunks), len(step.running), num_tokens
            )
        kind = "prefill" if step.chunks else "decode"
        self._num_steps += 1
        with self._watch.at(f"step {self._num_steps} ({kind})", builds=kind not in self._kinds_run):
            output = steps.run(step, says)
        self._kinds_run.add(kind)
        now = time.perf_counter()
        begin = 0
        for requests, start, end in step.told_of_experts:
            assert output.experts is not None, "those of all tokens that ask are there"
            experts = output.experts[begin : (begin := begin + end - start)]
            for request in requests:
                request.note_experts(start, experts)
        finished = self._scheduler.commit(step, output.sampled, self._stop_checker.stops, output.scores)
        steps.copy_blocks(self._scheduler.take_blocks_to_copy(self._home))
        for request in step.samples:
            if request.sampled:  # one that was put back has no token yet
                request.first_token_s = request.first_token_s or now
        for ended in finished:
            ended.finished_s = now
        return finished, output.heard

    def _rest_when_idle(self) -> None:
        """Where all has ended, nothing may be left behind."""
        if not self.is_idle or self._is_at_rest:
            return
        self._is_at_rest = True
        self._scheduler.check_integrity()
        stats = self._scheduler.stats
        self._log.shared(
            "done; since the engine began %d tokens generated, %d of prompts computed and %d found cached, %d "
            "preemption(s), %d prefix unit(s) evicted",
            stats.num_generated_tokens, stats.num_computed_prefill_tokens, stats.num_cached_prefill_tokens,
            stats.num_preemptions, sum(home.prefixes.num_evicted_units for home in self.homes),
        )  # fmt: skip
