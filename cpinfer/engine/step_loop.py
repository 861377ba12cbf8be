"""The loop that runs the steps of a scheduler until all of its requests are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator

from cpinfer.engine.request import Request
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step import Step
from cpinfer.engine.step_runner import StepRunner
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import EngineFaultError, StreamEndedError
from cpinfer.logs import RankLogger


class StepLoop:
    """Steps on one rank of `num_ranks` that decide alike; `finished` yields requests as they finish, once.

    `is_open` while somebody takes them. `is_cut` from the first step on until it has come to an end that all ranks
    know: where it never does, what the homes have written down of their blocks may be wrong. `left_alone`: what ended
    it here, where that could only be told to the others.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        steps: StepRunner,
        stop_checker: StopChecker,
        home: int,
        num_ranks: int,
        log: RankLogger,
    ) -> None:
        self._scheduler = scheduler
        self._stop_checker = stop_checker
        self._home = home
        self._num_ranks = num_ranks
        self._log = log
        self.is_open = False
        self.is_cut = False
        self.left_alone: StreamEndedError | None = None
        # It alone holds on to `steps`, and lets go of them when it ends: they own the memory of the KV pool.
        self.finished = self._until_done(steps)

    def _until_done(self, steps: StepRunner) -> Generator[Request, None, None]:
        """Steps until all is done; requests as they finish.

        Those of the last step come when it has ended: a consumer that lingers over them keeps nobody waiting, and may
        make the next call before it has taken them all.
        """
        try:
            self.is_open = self.is_cut = True
            steps.begin()
            finished: list[Request] = []
            while (step := self._scheduler.schedule()) is not None:
                finished = self._advance(steps, step)
                if not self._scheduler.num_unfinished:
                    break
                try:
                    yield from finished
                except BaseException:  # whoever takes the results has left
                    self._leave(steps)
                    raise
            self._end()
            yield from finished
        except EngineFaultError:
            steps.clear_cache()
            raise
        finally:
            self.is_open = False

    def _advance(self, steps: StepRunner, step: Step, *, leaves: bool = False) -> list[Request]:
        """Run a step and take note of it; the requests that it finished."""
        if self._log.isEnabledFor(logging.DEBUG):
            num_tokens = sum(chunk.end - chunk.start for chunk in step.chunks) or len(step.running)
            self._log.debug(
                "step: %d chunk(s), %d running, %d token(s)", len(step.chunks), len(step.running), num_tokens
            )
        output = steps.run(step, leaves=leaves)
        now = time.perf_counter()
        finished = self._scheduler.commit(step, output.sampled, self._stop_checker.stops, output.scores)
        steps.copy_blocks(self._scheduler.take_blocks_to_copy(self._home))
        for request in step.samples:
            if request.sampled:  # one that was put back has no token yet
                request.first_token_s = request.first_token_s or now
        for ended in finished:
            ended.finished_s = now
        return finished

    def _leave(self, steps: StepRunner) -> None:
        """Tell the others, who may be in the next step already, that this rank takes no more results.

        So it takes part in steps up to the first that has a record to say it in. Where all leave, all is well.
        """
        try:
            while self._num_ranks > 1 and (step := self._scheduler.schedule()) is not None:
                self._advance(steps, step, leaves=True)
        except StreamEndedError as ended:
            if len(ended.places) < self._num_ranks:
                self.left_alone = ended
                return
        self._end()

    def _end(self) -> None:
        self._scheduler.abort_all()
        self._scheduler.check_integrity()
        stats = self._scheduler.stats
        self._log.shared(
            "done: %d tokens generated, %d of prompts computed and %d found cached; %d preemption(s); %d prefix "
            "unit(s) evicted since the engine began",
            stats.num_generated_tokens, stats.num_computed_prefill_tokens, stats.num_cached_prefill_tokens,
            stats.num_preemptions, sum(home.prefixes.num_evicted_units for home in self._scheduler.homes),
        )  # fmt: skip
        self.is_open = self.is_cut = False
