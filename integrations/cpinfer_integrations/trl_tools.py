"""Samples with tools: TRL's own tool loop, run for every sample by itself, on the sessions of one engine.

TRL's loop takes a batch: all tools, then one turn for all, then all tools. Of a batch of one it makes the same sample,
so here each sample has a loop, in a thread; where the loop asks for a turn, the thread waits, and the turn is a request
of the sample's session. The main thread alone touches the engine, in one rhythm with the other ranks:

    main thread    step step step step step step step step      `Engine.run_until`, until no rank has a sample left
    sample 0       turn 0 | tool | turn 1             | end
    sample 1       turn 0       | tool           | turn 1
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from cpinfer.config import SamplingParams
from cpinfer.engine.engine import Engine
from cpinfer.engine.open_requests import RequestOutput
from cpinfer.engine.request import Prompt, RolloutResult
from cpinfer.engine.sessions import Session

T = TypeVar("T")
Tool = Callable[..., Any]
# A sequence so far, to be continued; what comes is the turn, None where nothing is left of the answer's length.
NextTurn = Callable[[list[int]], RolloutResult | None]
# What a sample's thread does: gets its place, its first turn, and how to ask for more.
Loop = Callable[[int, RolloutResult, NextTurn], T]


class _PhaseOver(BaseException):
    """Raised in threads that wait for a turn when there will be none; no tool's error handling takes it for its own."""


@dataclass(eq=False)
class Sample(Generic[T]):
    """A sample under way: the turns that it was given, and what its loop returned."""

    index: int
    prompt_ids: list[int]
    turns: list[RolloutResult] = field(default_factory=list)
    outcome: list[T] = field(default_factory=list)  # one, once it has ended
    session: Session | None = None
    num_sessions: int = 0
    replies: SimpleQueue[RolloutResult | None] = field(default_factory=SimpleQueue)


@dataclass(frozen=True)
class _Event(Generic[T]):
    """What a thread has come to: it asks for a turn after `token_ids`, or has ended, with an error or without."""

    sample: Sample[T]
    token_ids: list[int] | None = None
    error: Exception | None = None


class ToolLoops(Generic[T]):
    """The loops of one phase, one per prompt of this rank.

    With `in_order` they take turns as TRL's loop has them: one thread at a time, in the order of the samples, and no
    turn begins before all have asked for theirs.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: Sequence[list[int]],
        sampling: SamplingParams,
        name: str,
        loop: Loop[T],
        *,
        in_order: bool,
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._name = name
        self._loop = loop
        self._in_order = in_order
        self._samples = [Sample[T](index, list(ids)) for index, ids in enumerate(prompt_ids)]
        self._events: SimpleQueue[_Event[T]] = SimpleQueue()
        # A sample is in one of these, or among those that run, until it has ended.
        self._asked = [(sample, sample.prompt_ids) for sample in self._samples]
        self._pending: dict[str, Sample[T]] = {}
        self._ready: list[Sample[T]] = []
        self._num_running = 0
        self._error: Exception | None = None

    def run(self) -> None:
        """Until all samples of the replica have ended, or those of a rank have failed. Collective over the replica."""
        try:
            self._engine.run_until(self._advance)
        finally:
            for sample in self._samples:
                sample.replies.put(None)

    def results(self) -> list[tuple[list[RolloutResult], T]]:
        """Of each sample its turns, and what its loop returned. Raises what went wrong on this rank alone."""
        if self._error is not None:
            raise self._error
        return [(sample.turns, outcome) for sample in self._samples for outcome in sample.outcome]

    def _advance(self, outputs: Sequence[RequestOutput]) -> bool:
        """Between two steps: hand on what has come, ask for what is wanted. Returns whether there is nothing left."""
        self._guarded(lambda: self._take(outputs))
        self._guarded(self._take_events)
        if self._error is not None:
            return self._has_given_up()
        if not self._in_order:
            self._resume(len(self._ready))
            self._guarded(self._ask)
        elif not self._pending and not self._num_running:
            if self._ready:
                self._ready.sort(key=lambda sample: sample.index)
                self._resume(1)
            else:
                self._guarded(self._ask)
        return self._error is None and not (self._pending or self._ready or self._asked or self._num_running)

    def _guarded(self, act: Callable[[], None]) -> None:
        """An error of this rank alone is kept until all ranks are there to hear of it: they are in the same steps."""
        try:
            act()
        except Exception as error:
            self._error = self._error or error

    def _has_given_up(self) -> bool:
        """After an error: tools that run are left alone, and requests end. Returns whether they have."""
        for request_id in self._pending:
            self._engine.abort(request_id)
        return not self._pending

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                sample = self._pending.pop(output.request_id)
                assert output.result is not None, "a step that fails raises"
                sample.turns.append(output.result)
                self._ready.append(sample)

    def _take_events(self) -> None:
        while not self._events.empty():
            event = self._events.get()
            self._num_running -= 1
            if event.error is not None:
                raise event.error
            if event.token_ids is not None:
                self._asked.append((event.sample, event.token_ids))
            elif event.sample.session is not None:
                self._engine.close_session(event.sample.session)

    def _resume(self, num: int) -> None:
        """Let the first of those that have got their turn go on."""
        resumed, self._ready = self._ready[:num], self._ready[num:]
        for sample in resumed:
            self._num_running += 1
            if len(sample.turns) > 1:
                sample.replies.put(sample.turns[-1])
            else:  # a daemon: a tool that never returns must not keep the process
                threading.Thread(
                    target=self._run_loop, args=(sample,), name=f"tools-{sample.index}", daemon=True
                ).start()

    def _ask(self) -> None:
        asked, self._asked = self._asked, []
        for sample, token_ids in asked:
            self._add(sample, token_ids)

    def _add(self, sample: Sample[T], token_ids: list[int]) -> None:
        """Queue the next turn: what the session does not hold yet of `token_ids`; where it holds others, a new one."""
        session = sample.session
        if session is not None and tuple(token_ids[: len(session.token_ids)]) != session.token_ids:
            self._engine.close_session(session)
            session = None
        if session is None:
            name = f"{self._name}/{sample.index}.{sample.num_sessions}"
            prompt = Prompt(sample.index, name, tuple(token_ids))
            sample.session = session = self._engine.open_session(prompt)
            sample.num_sessions += 1
        room = self._room(sample, token_ids)
        sampling = replace(self._sampling, max_new_tokens=room, min_new_tokens=min(self._sampling.min_new_tokens, room))
        new = token_ids[len(session.token_ids) :]
        self._pending[self._engine.add(new, sampling, session=session, only_whole=True)] = sample

    def _room(self, sample: Sample[T], token_ids: list[int]) -> int:
        """What is left of an answer's length: TRL counts all that comes after the first prompt."""
        return self._sampling.max_new_tokens - (len(token_ids) - len(sample.prompt_ids))

    def _run_loop(self, sample: Sample[T]) -> None:
        """The body of a sample's thread. It always ends in an event, for which the main thread waits."""

        def next_turn(token_ids: list[int]) -> RolloutResult | None:
            if self._room(sample, token_ids) < 1:
                return None
            self._events.put(_Event(sample, token_ids))
            reply = sample.replies.get()
            if reply is None:
                raise _PhaseOver
            return reply

        try:
            sample.outcome.append(self._loop(sample.index, sample.turns[0], next_turn))
        except _PhaseOver:
            return
        except Exception as error:
            self._events.put(_Event(sample, error=error))
        except BaseException as error:  # in a thread `sys.exit` ends nothing but the thread, for which all would wait
            died = RuntimeError(f"a tool of sample {sample.index} ended its thread with {error!r}")
            died.__cause__ = error
            self._events.put(_Event(sample, error=died))
        else:
            self._events.put(_Event(sample))


def within(timeout_s: float, tool: Tool) -> Tool:
    """A tool whose call fails after so many seconds. A call that goes on nevertheless is left to itself."""

    def call(**arguments: Any) -> Any:
        ended: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                ended.put((tool(**arguments), None))
            except BaseException as error:
                ended.put((None, error))

        threading.Thread(target=run, name=f"tool-{tool.__name__}", daemon=True).start()
        try:
            result, error = ended.get(timeout=timeout_s)
        except Empty:
            raise _too_late(tool, timeout_s) from None
        if error is not None:
            raise error
        return result

    return call


def awaited_within(timeout_s: float, tool: Tool) -> Tool:
    """The same for a tool that is a coroutine function, whose call is cancelled."""

    async def call(**arguments: Any) -> Any:
        task = asyncio.ensure_future(tool(**arguments))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            task.cancel()
            raise _too_late(tool, timeout_s)
        return task.result()

    return call


def _too_late(tool: Tool, timeout_s: float) -> TimeoutError:
    return TimeoutError(f"{tool.__name__} did not return within {timeout_s:g} s (rollout.tool_timeout_s)")
