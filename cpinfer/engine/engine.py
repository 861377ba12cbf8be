"""The engine: a model attached to a topology, a KV pool, and calls that run steps until their answers are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, TypeVar

from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.engine.agreement import Prepared, Says, begin_together, gather_packed
from cpinfer.engine.core import Batch, EngineCore, Load
from cpinfer.engine.input_processor import InputProcessor
from cpinfer.engine.layout_choice import DecodeLayout
from cpinfer.engine.open_requests import OpenRequests, RequestOutput
from cpinfer.engine.prompts import PromptLike, PromptsLike, longest_prompt
from cpinfer.engine.request import Request, RolloutResult, SampledRequest, ScoreResult, in_waves
from cpinfer.engine.scheduler_stats import SchedulerStats
from cpinfer.engine.sessions import Session
from cpinfer.engine.step_factory import make_layout_choice, make_scheduler, prepared_steps
from cpinfer.engine.step_runner import StepRunner
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import StreamEndedError
from cpinfer.models.generation_config import sampling_keys
from cpinfer.models.runner import ModelRunner

T = TypeVar("T")

# How long a rank rests before it asks again, when nothing is under way on any.
_IDLE_S = 0.001


class Engine:
    """Generates with an attached model. Every rank of a dp replica holds one and makes the same calls on it.

    Made by `cpinfer.attach`, awake, and valid inside its block. `kv_capacity_tokens` is how long one sequence could be;
    `topology` and `tokenizer` are what it was made with, `weights_dtype` is that of the layers.
    """

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, tokenizer: Any | None, layouts: Sequence[DecodeLayout]
    ) -> None:
        self._runner, self._config, self._layouts = runner, config, layouts
        topology, self._needs = layouts[0].topology, layouts[0].needs
        self.topology, self.tokenizer, self.weights_dtype = topology, tokenizer, runner.weights_dtype
        self._stop_checker = StopChecker(runner.spec.eos_token_ids, tokenizer)
        log, unseen = topology.logger(__name__), runner.expert_layers.unseen
        self._inputs = InputProcessor(runner.spec, self._needs.pool_size, tokenizer, log, unseen)
        scheduler, home = make_scheduler(runner, layouts[0], config), topology.grid.home(topology.rank)
        self._core = EngineCore(scheduler, self._stop_checker, home, topology.replica.size, log, topology.watch)
        self._open = OpenRequests(self._core, self._inputs, self._stop_checker, topology, runner.device)
        self._steps: StepRunner | None = None
        # Whether ranks have exchanged arrivals, and whether they do so before the next step.
        self._exchanges_arrivals = self._has_arrivals = self._is_closed = False
        self._counted_before, self._num_calls, self.weights_version = SchedulerStats(), 0, 0

    @property
    def stats(self) -> SchedulerStats:
        """What the scheduler has done since the last call began, whoever asked for it."""
        return self._core.scheduler.stats - self._counted_before

    @property
    def load(self) -> Load:
        """What is under way in this replica, and what was done since the engine began. From any thread."""
        return self._core.load

    @property
    def kv_capacity_tokens(self) -> int:
        return self._needs.pool_size.capacity_tokens

    @property
    def max_positions(self) -> int:
        """How many tokens the model can see at once, prompt and answer together."""
        return self._runner.spec.max_positions

    def longest_prompt(self, sampling: SamplingParams) -> int:
        """The longest prompt that leaves room for a whole answer.

        Args:
            sampling: what the answer is sampled with; its `max_new_tokens` counts.

        Returns:
            Its length in tokens; below 1 when no prompt leaves room.
        """
        return longest_prompt(sampling, self._runner.spec, self._needs.pool_size)

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the model's own generation_config says of sampling: no call takes it unless it is handed over.

        Args:
            changes: keys of `SamplingParams` that win over it.

        Returns:
            The parameters. Where neither says anything, the defaults of `SamplingParams`; `do_sample: false` is
            temperature 0.

        Raises:
            UserError: where the generation_config asks for something that cpinfer does not know, or a value is illegal.
        """
        return SamplingParams(**{**sampling_keys(self._runner.generation_config), **changes})

    @property
    def is_awake(self) -> bool:
        return self._steps is not None

    @property
    def kv_pool_bytes(self) -> int:
        """What the KV pool takes on this rank while the engine is awake."""
        return self._needs.pool_bytes(self._runner.spec)

    def wake(self) -> None:
        """Allocate the KV pool, and what attention kernels work in. Nothing happens when it is there.

        A rank that cannot is an error on all of them. Collective over the replica: one small gather.
        """
        self._refuse_when_closed()
        made_of = self._runner, self._layouts, self._config
        self._halt()
        with self._runner.prepacked.released_after_errors():
            steps, known = begin_together(
                self.topology, self._runner.device, lambda: prepared_steps(self._steps, *made_of, self._stop_checker)
            )
        self._steps = steps
        self._core.layouts = self._core.layouts or make_layout_choice(*made_of, steps, is_known=all(known))

    def sleep(self) -> None:
        """Free the KV pool and all scratch, for the optimiser to use; cached prefixes are gone with it.

        Requests that were added, and sessions, are computed anew when it is awake again.
        """
        self._refuse_while_streaming("sleep")
        self._halt()
        self._drop_kv()
        self._steps = None
        self._runner.prepacked.release()

    def weights_changed(self) -> None:
        """Tell the engine that the weights are new: `weights_version` rises, what is cached by old ones is dropped.

        Requests that were added go on where they are, over KV of the same tokens by the new weights.
        """
        self._refuse_when_closed()
        self._refuse_while_streaming("change weights")
        self._halt()
        self._take_new_weights()

    def close(self) -> None:
        """End what is under way, free the KV pool, refuse later calls. `attach` calls it when its block ends."""
        if self._exchanges_arrivals:
            with suppress(StreamEndedError):  # those who go on have it
                self._halt()
        elif self._steps is not None:
            for batch in self._core.open_batches():
                self._core.leave(batch, self._advance)
        self._is_closed = True
        self._steps = None

    def raise_if_left_alone(self) -> None:
        """StreamEndedError when this rank left a stream that others went on with: they have it, and so it does here."""
        if self._core.left_alone is not None:
            error, self._core.left_alone = self._core.left_alone, None
            raise error

    def generate(
        self, prompts: PromptsLike, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RolloutResult]:
        """All samples of all prompts; collective, and with errors, as `stream`.

        Args:
            prompts: one or several, in any form that `stream` takes.
            sampling: for all prompts, or one for each; default: `SamplingParams()`. What a prompt says of its own wins.

        Returns:
            The samples in order of prompt and sample, the same on every rank; none for an empty list of prompts.
        """
        results = list(self.stream(prompts, sampling))
        return sorted(results, key=lambda r: (r.prompt_index, r.sample_index))

    def generate_pooled(
        self,
        own_prompts: PromptsLike,
        sampling: SamplingParams | None = None,
        *,
        name: str = "",
        num_copies: int = 1,
    ) -> list[RolloutResult]:
        """One sample for each of *this rank's* prompts. Collective over the replica.

        The prompts of all ranks of the replica become one batch, in which each distinct prompt is prefilled once, and
        every rank takes part in all of it; each then keeps its own. Errors as `stream` has them: what one rank cannot
        run is an error on all.

        Args:
            own_prompts: this rank's, in any form that `stream` takes, without ids. One that stands n times gets n
                samples. Ranks may bring different numbers of them, none included.
            sampling: for all prompts; default: `SamplingParams()`. Its `n` counts for nothing.
            name: sets this batch apart from others of the same seed: batches of one name, layout and seed draw the
                same random numbers. Without one it draws its own; the ids of the results tell the name to repeat it.
            num_copies: consecutive ranks that train on the same data (tensor parallelism); they bring the same prompts
                and get the same samples.

        Returns:
            This rank's samples, in the order of its prompts.
        """
        self._refuse_when_closed()
        topology, replica = self.topology, self.topology.replica
        packed, lens = self._begin(
            "generate_pooled", lambda: self._inputs.packed(own_prompts, sampling, name, num_copies, replica.size)
        )
        told = gather_packed(replica, packed, lens, self._runner.device)
        name = name or f"unnamed-{told[0][0][0]:x}"
        requests, places = self._inputs.pooled(
            [lists for _, *lists in told], num_copies, sampling, f"{name}/{topology.coords.dp_rank}"
        )
        results = {(r.prompt_index, r.sample_index): r for r in self._results(requests)}
        return [results[place] for place in places[replica.index // num_copies]]

    def stream(
        self,
        prompts: PromptsLike,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        skip: frozenset[tuple[int, int]] = frozenset(),
    ) -> Iterator[RolloutResult]:
        """Samples as they finish. Collective over the replica: one small gather, beside the steps.

        Every rank takes all results, or leaves the loop at the same one. Several streams may be open at once: a step
        advances the requests of all, whoever asks for it.

        Args:
            prompts: one or several. A prompt is text, a list or an array of token ids, a chat (a list of messages), a
                `Prompt`, or an object with the keys of an input line. One without an id draws anew in every call.
            sampling: for all prompts, or one for each; default: `SamplingParams()`. What a prompt says of its own wins.
            skip: pairs (prompt_index, sample_index) that are not wanted.

        Yields:
            Samples, on every rank alike.

        Raises:
            UserError: for a prompt that can never run, before anything runs.
            RanksDifferError: when ranks do not make the same call, before anything runs.
            StreamEndedError: when some ranks leave alone; on those at their next call, or where the block ends.
            RuntimeError: when the engine sleeps, its block has ended, or a step of another stream has failed.
        """
        self._refuse_when_closed()
        name = f"{self.weights_version}/{self.topology.coords.dp_rank}/call-{self._num_calls}"  # of no other call
        requests, _ = self._begin("generate", lambda: self._inputs.samples(prompts, sampling, skip, name))
        yield from self._results(requests)
        self._refuse_when_closed()  # else the end of the block would pass for that of the stream

    def score(self, pairs: Iterable[tuple[PromptLike, Sequence[int]]]) -> list[ScoreResult]:
        """How likely the model finds given continuations. Collective over the replica.

        Prompts that several continuations share are computed once, as far as the pool can keep them. At most
        `MAX_SCORED_POSITIONS` rows of logits exist at a time.

        Args:
            pairs: (prompt, continuation), prompts in any form that `stream` takes, continuations as token ids.

        Returns:
            A result for each pair, in their order.

        Raises:
            UserError: for a pair that can never run, or a continuation without tokens; other errors as `stream`.
        """
        self._refuse_when_closed()
        requests, _ = self._begin("score", lambda: self._inputs.scored(pairs))
        for wave in in_waves(requests):
            for _ in self._finished(wave):  # what it yields, it has written into the requests
                pass
        return [request.result() for request in requests]

    def add(
        self,
        prompt: PromptLike,
        sampling: SamplingParams | None = None,
        *,
        session: Session | None = None,
        priority: int = 0,
        only_whole: bool = False,
    ) -> str:
        """Queue a request of this rank, at any time and from any thread; steps advance it with all others. Local.

        Args:
            prompt: one, in any form that `stream` takes. With a session: token ids behind the session's own, or none.
            sampling: default: `SamplingParams()`. A turn of a session is a single sample.
            session: to continue: the request is its next turn, on KV that is there.
            priority: of requests that wait the lowest goes first; of equal ones the first.
            only_whole: whether a sample has a single output, with all its tokens, when it has ended.

        Returns:
            Its id: the prompt's, where it names one, else one of its own. The text is a function of it, of the seed and
            of the tokens it begins with, not of when it came or what ran beside it.

        Raises:
            UserError: for what can never run, an id or turn under way, a session closed or of another rank.
            RuntimeError: when the engine's block has ended.
        """
        self._refuse_after_close()
        return self._open.add(prompt, sampling or SamplingParams(), session, priority, self.weights_version, only_whole)

    def step(self) -> list[RequestOutput]:
        """Advance the requests of all ranks by one step. Collective over the replica.

        Before it, where some rank has added or aborted something, all ranks learn of it (two small gathers); where
        nobody has, a step costs what it costs in `stream`. With nothing under way ranks only ask each other.

        Returns:
            What is new of this rank's requests, also by steps that a stream has made; empty where nothing is.

        Raises:
            RanksDifferError: when ranks do not make the same call, also where one ends its block.
            EngineFaultError: when a step fails. What was under way is lost, as later outputs say ("error").
            RuntimeError: when the engine sleeps, or its block has ended.
        """
        self._refuse_when_closed()
        self._advance(Says.WAITS)
        return self._open.take_outputs(self.weights_version)

    def run_until(self, condition: Callable[[list[RequestOutput]], bool]) -> None:
        """Steps until nobody waits for anything. Collective over the replica; errors as `step`.

        A rank that has nothing left goes on stepping for those that do, and one that waits for a tool or a client
        steps with the others.

        Args:
            condition: whether this rank has all it wants, and does so from then on. Asked before every step with what
                the one before gave; it may add, abort, open and close. The loop ends when all ranks have.
        """
        while True:
            self._refuse_when_closed()
            has_all = condition(self._open.take_outputs(self.weights_version))
            heard = self._advance(Says.NOTHING if has_all else Says.WAITS)
            if heard is not None and not heard & (Says.WAITS | Says.NEWS):
                return
            if self._core.is_idle:
                time.sleep(_IDLE_S)

    def abort(self, request_id: str) -> None:
        """End a request of this rank, at any time and from any thread. Local.

        A step tells the other ranks that there is news, and the request ends before the one after it.

        Args:
            request_id: what `add` returned. Its last output has what was generated, and "abort" for a `finish_reason`.
                Nothing happens where it has ended.
        """
        self._refuse_after_close()
        self._open.abort(request_id)

    def open_session(self, prompt: PromptLike) -> Session:
        """A sequence of this rank that grows by turns. Local; nothing is computed before the first turn.

        Between turns its KV stays in its home: as much as `max_session_tokens` allows, and as long as nobody needs the
        room. What is gone, and what was made by old weights, is computed anew.

        Args:
            prompt: what it begins with, in any form that `stream` takes.

        Returns:
            The session, for `add` on this rank; to be closed. UserError for a prompt that can never run.
        """
        self._refuse_after_close()
        return self._open.open_session(prompt, self.weights_version)

    def close_session(self, session: Session) -> None:
        """Forget a session of this rank; a turn that is under way is aborted. Local.

        Args:
            session: what `open_session` gave. Its `token_ids` stay readable.

        Raises:
            UserError: when it is closed, or not this rank's.
        """
        self._refuse_after_close()
        self._open.close_session(session)

    def _advance(self, says: Says) -> Says | None:
        """A step of all that is under way, behind an exchange of arrivals if it is due. What ranks said, if asked."""
        if self._runner.adapters and self._adapters_changed():
            self._halt()
            self._take_new_weights()
        if self._has_arrivals or self._core.is_idle or self._core.is_cut or self._steps is None:
            told, numbers = self._begin("step", lambda: self._open.told(says), is_call=False)
            self._exchanges_arrivals = True
            said = self._open.take_in(told, numbers, self.weights_version)
            self._has_arrivals = False
            if self._core.is_idle:
                return said
        assert self._steps is not None, "who sleeps could not exchange"
        heard = self._core.advance(self._steps, says | Says.NEWS * self._open.has_arrivals)
        # Where nobody was asked, nobody could say so.
        self._has_arrivals = self._exchanges_arrivals if heard is None else bool(heard & Says.NEWS)
        return heard

    def _halt(self) -> None:
        """Before what all ranks do between two steps of `step`: StreamEndedError on all where some are in the next."""
        if self._exchanges_arrivals and self._steps is not None:
            self._core.halt(self._advance)

    def _adapters_changed(self) -> bool:
        """Whether adapters were switched, merged or scaled since this was last asked: they make other weights."""
        if not self._runner.has_other_adapters:
            return False
        try:
            self._refuse_while_streaming("change adapters")
        except RuntimeError:
            self._core.is_cut = True  # what is cached is of others
            raise
        self._runner.notice_adapters()
        return True

    def _take_new_weights(self) -> None:
        self._drop_kv()
        self.weights_version += 1
        if self._steps is not None:
            self._steps.weights_changed()

    def _drop_kv(self) -> None:
        if self._core.is_cut:
            self._core.reset()
            self._open.note_lost(self.weights_version)
        else:
            self._open.note(self.weights_version)
            self._core.restart(self.weights_version)

    def _begin(self, call: str, prepare: Callable[[], Prepared[T]], *, is_call: bool = True) -> tuple[T, list[int]]:
        """What this rank prepares for a call, when all ranks have prepared the same, and the numbers of all."""

        def ready() -> Prepared[T]:
            self._check_ready()
            if is_call:
                self._counted_before = replace(self._core.scheduler.stats)
            prepared = prepare()
            return replace(prepared, same=lambda: {"call": call, **self._state(), **prepared.same()})

        if is_call:
            self._halt()
        begun = begin_together(self.topology, self._runner.device, ready)
        self._num_calls += is_call
        return begun

    def _check_ready(self) -> None:
        """What has to hold when a call begins; where it does not on one rank, `begin_together` tells the others."""
        if self._steps is None:
            raise RuntimeError("the engine sleeps; call wake() before generating or scoring")
        self._runner.check_unchanged()
        if self._adapters_changed():
            self._take_new_weights()
        if self._core.is_cut:  # it may have ended between taking blocks and writing them down, or KV is not finite
            self._drop_kv()

    def _state(self) -> dict[str, object]:
        """What ranks must have in common when a call begins, beside what it is about."""
        same = {"weights_version": self.weights_version, "adapters": self._runner.adapters}
        return {**same, "free KV blocks": [home.pool.num_free for home in self._core.homes]}

    def _results(self, requests: Sequence[SampledRequest]) -> Iterator[RolloutResult]:
        version = self.weights_version
        with closing(self._finished(requests)) as finished:
            for request in finished:
                assert isinstance(request, SampledRequest), "nothing else was asked for"
                yield request.result(self._stop_checker.text(request), version)

    def _finished(self, requests: Sequence[Request]) -> Generator[Request, None, None]:
        """Requests as they end; steps run until all have.

        Those of the last step come when the batch has ended: who lingers over them keeps nobody waiting.
        """
        batch = Batch(requests)
        try:
            self._core.submit(batch)
            while batch.num_unfinished:
                self._refuse_when_lost(batch)
                self._advance(Says.WAITS)
                if batch.num_unfinished:
                    yield from batch.take()
        except BaseException:  # as a rule whoever takes the results has left
            if self._steps is not None:
                self._core.leave(batch, self._advance)
            raise
        yield from batch.take()

    def _refuse_when_lost(self, batch: Batch) -> None:
        if batch.is_lost or self._core.is_cut:
            raise RuntimeError(
                "a step of another stream has failed, and took the requests of this one with it; ask for them again"
            )

    def _refuse_when_closed(self) -> None:
        self.raise_if_left_alone()
        self._refuse_after_close()

    def _refuse_after_close(self) -> None:
        if self._is_closed:
            raise RuntimeError("the block of this engine has ended, its model is the job's again; attach it for more")

    def _refuse_while_streaming(self, what: str) -> None:
        if not self._core.is_cut and any(not self._open.has(batch) for batch in self._core.open_batches()):
            raise RuntimeError(f"cannot {what} while a stream is open; finish or close it first")
