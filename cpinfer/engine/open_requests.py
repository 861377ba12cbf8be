"""Requests that come while others run: what each rank asks for is told to all, and each gets what its own give.

this rank, any thread         add, abort, close_session  ->  outbox
all ranks, between two steps  what the outboxes hold, in the order of (rank, place in its outbox)  ->  core
this rank, after a step       new tokens of its own requests, and how they ended  ->  outputs
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import count
from operator import or_
from typing import Any, Literal, NamedTuple

import torch

from cpinfer.comm.topology import Topology
from cpinfer.config import SamplingParams
from cpinfer.engine.agreement import Prepared, Says, ended_by, gather_bytes
from cpinfer.engine.core import Batch, EngineCore
from cpinfer.engine.input_processor import InputProcessor
from cpinfer.engine.prompts import PromptLike
from cpinfer.engine.request import FinishReason, Prompt, Request, RolloutResult, SampledRequest, SampledToken
from cpinfer.engine.sessions import Session
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import UserError, quoted

# By what ranks know a request: the place in the replica of the rank that has it, and its number there.
Key = tuple[int, int]
# Likewise a session, which has an id.
SessionKey = tuple[int, str]


class RequestOutput(NamedTuple):  # one for every token of every request: cheaper to make than a frozen dataclass
    """What became of one sample since it was last told of.

    Attributes:
        request_id: what `Engine.add` returned.
        sample_index: which of the request's samples this is, from 0.
        tokens: its new tokens, each with its logprobs.
        weights_version: of the weights that they were sampled by.
        finish_reason: None while it goes on; "error" where a step failed and took it along.
        result: all of it, once it has ended other than by an error.
    """

    request_id: str
    sample_index: int
    tokens: tuple[SampledToken, ...]
    weights_version: int
    finish_reason: FinishReason | Literal["error"] | None = None
    result: RolloutResult | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the new tokens."""
        return tuple(token.token_id for token in self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of the new tokens, as `RolloutResult` has them."""
        return tuple(token.logprob for token in self.tokens)

    @property
    def processed_logprobs(self) -> tuple[float, ...]:
        """Of the new tokens, as `RolloutResult` has them."""
        return tuple(token.processed_logprob for token in self.tokens)


@dataclass(frozen=True)
class _NewRequest:
    """A request as it travels; its number is the prompt's index.

    Where it is a turn of a session, named by its id, `prompt` is what is new behind `num_before` tokens.
    """

    prompt: Prompt
    params: SamplingParams
    priority: int
    session: str | None = None
    num_before: int = 0


@dataclass(frozen=True)
class _Abort:
    """End a request."""

    number: int


@dataclass(frozen=True)
class _CloseSession:
    """Forget a session."""

    id: str


_Arrival = _NewRequest | _Abort | _CloseSession


@dataclass(frozen=True)
class _Told:
    """What one rank tells the others: so many arrivals, as bytes."""

    num_arrivals: int
    packed: bytes


# What a rank says, below the number of bytes that it has to tell.
_SAYS_BITS = max(Says).bit_length()


@dataclass(frozen=True)
class _Own:
    """A request of this rank that has not ended: its name, the session that it is a turn of, when it was added."""

    id: str
    session: Session | None
    added_s: float
    only_whole: bool


@dataclass(eq=False)
class _OpenBatch(Batch):
    """The samples of one request, of which `num_settled` have ended. `num_told`: tokens that its rank knows of each."""

    requests: Sequence[SampledRequest]
    key: Key = (0, 0)
    session: SessionKey | None = None
    num_settled: int = 0
    num_told: dict[int, int] = field(default_factory=dict)


class OpenRequests:
    """The requests of `add`, and the sessions. What is kept of all ranks' is the same on each of them."""

    def __init__(
        self,
        core: EngineCore,
        inputs: InputProcessor,
        stop_checker: StopChecker,
        topology: Topology,
        device: torch.device,
    ) -> None:
        self._core = core
        self._inputs = inputs
        self._stop_checker = stop_checker
        self._replica = topology.replica
        self._device = device
        self._place = topology.replica.index
        self._dp_rank = topology.coords.dp_rank
        # This rank's own. Whoever adds may be another thread than the one that steps.
        self._lock = threading.RLock()
        self._numbers = count()
        self._outbox: list[_Arrival] = []
        self._own: dict[int, _Own] = {}
        self._numbers_of: dict[str, int] = {}
        self._sessions: dict[str, Session] = {}
        self._outputs: list[RequestOutput] = []
        # Of all ranks: requests under way, by key and by `id` of each sample; of each session its last turn.
        self._batches: dict[Key, _OpenBatch] = {}
        self._batch_of: dict[int, _OpenBatch] = {}
        self._last_turns: dict[SessionKey, SampledRequest] = {}
        self._ended: deque[Request] = deque()

    def has(self, batch: Batch) -> bool:
        """Whether a batch of the core is a request that was added, of whichever rank."""
        return isinstance(batch, _OpenBatch)

    @property
    def has_arrivals(self) -> bool:
        """Whether this rank has something to tell the others."""
        return bool(self._outbox)

    def add(
        self,
        prompt: PromptLike,
        params: SamplingParams,
        session: Session | None,
        priority: int,
        version: int,
        only_whole: bool,
    ) -> str:
        """Queue a request of this rank. Its id. UserError for what can never run."""
        if type(priority) is not int:
            raise UserError(f"priority is {quoted(priority)}; a whole number was wanted, the lowest goes first.")
        number = next(self._numbers)
        if session is None:
            made, params = self._inputs.checked(prompt, number, params, self._default_id(version, number))
            request = _NewRequest(made, params, priority)
        else:
            self._check(session)
            new = self._inputs.checked_turn(session.token_ids, prompt, params)
            # Until a turn has ended nobody else knows of the session.
            is_known = session.num_turns > 0
            num_before = len(session.token_ids) if is_known else 0
            given = new if is_known else (*session.token_ids, *new)
            made = Prompt(number, f"{session.id}/{session.num_turns}", given)
            request = _NewRequest(made, params, priority, session.id, num_before)
        with self._lock:
            if made.id in self._numbers_of:
                raise UserError(f"a request with the id {quoted(made.id)} is under way; ids name requests, and differ.")
            if session is not None:
                self._check(session)  # again: another thread may have been here
                session.turn = made.id
            self._own[number] = _Own(made.id, session, time.perf_counter(), only_whole)
            self._numbers_of[made.id] = number
            self._outbox.append(request)
        return made.id

    def abort(self, request_id: str) -> None:
        """End a request of this rank before the next step. Nothing happens to one that has ended."""
        with self._lock:
            number = self._numbers_of.get(request_id)
            if number is not None:
                self._outbox.append(_Abort(number))

    def open_session(self, prompt: PromptLike, version: int) -> Session:
        """A session of this rank that begins with a prompt. UserError for one that can never run."""
        number = next(self._numbers)
        any_turn, default_id = SamplingParams(max_new_tokens=1), self._default_id(version, number)
        made, _ = self._inputs.checked(prompt, number, any_turn, default_id)
        if made.sampling:
            raise UserError('"sampling" of a session\'s prompt: each turn has its own. Give it to `add`.')
        session = Session(made.id, made.token_ids)
        with self._lock:
            if made.id in self._sessions:
                raise UserError(f"a session with the id {quoted(made.id)} is open; ids name sessions, and differ.")
            self._sessions[made.id] = session
        return session

    def close_session(self, session: Session) -> None:
        """Forget a session of this rank; a turn of it that is under way is aborted."""
        with self._lock:
            self._check(session, may_run=True)
            if session.turn is not None:
                self.abort(session.turn)
            session.is_closed = True
            self._outbox.append(_CloseSession(session.id))

    def told(self, says: Says) -> Prepared[_Told]:
        """What this rank has to tell the others, for `begin_together`: its number says how much, and what it `says`."""
        with self._lock:
            told = _Told(len(self._outbox), pickle.dumps(self._outbox) if self._outbox else b"")
        return Prepared(told, dict, number=len(told.packed) << _SAYS_BITS | says)

    def take_in(self, own: _Told, numbers: Sequence[int], version: int) -> Says:
        """Give the core what all ranks have told, in their order. What they say; `NEWS` where there was any.

        `numbers` of all ranks are as `told` makes them. One collective, where there is anything. StreamEndedError when
        some rank leaves; nothing is taken in then.
        """
        said = [Says(number & (1 << _SAYS_BITS) - 1) for number in numbers]
        lens = [number >> _SAYS_BITS for number in numbers]
        heard = reduce(or_, said, Says.NOTHING)
        with self._core.all_or_cut():
            if heard & Says.LEAVES:
                raise ended_by([place for place, says in enumerate(said) if says & Says.LEAVES])
            if any(lens):
                heard |= Says.NEWS
                gathered = gather_bytes(self._replica, own.packed, lens, self._device)
                with self._lock:
                    del self._outbox[: own.num_arrivals]
                for place, packed in enumerate(gathered):
                    for arrival in pickle.loads(packed) if packed else ():
                        self._apply(place, arrival, version)
        return heard

    def take_outputs(self, version: int) -> list[RequestOutput]:
        """What is new of this rank's requests."""
        self.note(version)
        outputs, self._outputs = self._outputs, []
        return outputs

    def note(self, version: int) -> None:
        """Put what is new of this rank's requests with the outputs; it was made by `version` of the weights."""
        self._settle(version)
        for request in self._core.scheduler.running:
            batch = self._batch_of.get(id(request))
            if batch is not None and batch.key[0] == self._place:
                self._tell(batch, request, version)

    def note_lost(self, version: int) -> None:
        """Take note that the core has lost all requests. Sessions are what they were before their turns."""
        self._settle(version)
        to_come = {arrival.prompt.index for arrival in self._outbox if isinstance(arrival, _NewRequest)}
        lost = {number: [0] for number in self._own.keys() - to_come}
        for (place, number), batch in self._batches.items():
            if place == self._place:
                lost[number] = [r.sample_index for r in batch.requests if id(r) in self._batch_of]
        self._batches, self._batch_of = {}, {}
        for number, samples in sorted(lost.items()):
            own = self._end(number)
            self._outputs += [RequestOutput(own.id, sample, (), version, "error") for sample in samples]

    def _default_id(self, version: int, number: int) -> str:
        """Of no other request of the job's engines by these weights."""
        return f"{version}/{self._dp_rank}/rank-{self._place}/{number}"

    def _check(self, session: Any, *, may_run: bool = False) -> None:
        """UserError for what is no session of this engine and rank that could have a turn now."""
        if isinstance(session, Session) and session.is_closed:
            raise UserError(f"session {quoted(session.id)} is closed; open another with `open_session`.")
        if not isinstance(session, Session) or self._sessions.get(session.id) is not session:
            raise UserError("this is no session of this engine; what `open_session` gave on this rank was wanted.")
        if session.turn is not None and not may_run:
            raise UserError(f"session {quoted(session.id)} has a turn under way, {quoted(session.turn)}; let it end.")

    def _apply(self, place: int, arrival: _Arrival, version: int) -> None:
        if isinstance(arrival, _NewRequest):
            self._submit((place, arrival.prompt.index), arrival)
        elif isinstance(arrival, _Abort):
            self._abort((place, arrival.number), version)
        else:
            last = self._last_turns.pop((place, arrival.id), None)
            if last is not None:
                self._core.let_go(last)
            if place == self._place:
                del self._sessions[arrival.id]

    def _submit(self, key: Key, new: _NewRequest) -> None:
        session = None if new.session is None else (key[0], new.session)
        prompt, before = new.prompt, None
        if session is not None and (before := self._last_turns.get(session)) is not None:
            prompt = replace(prompt, token_ids=(*before.all_token_ids, *prompt.token_ids))
        assert len(prompt.token_ids) == new.num_before + len(new.prompt.token_ids), "ranks know the same of a session"
        requests = self._inputs.requests(prompt, new.params)
        for request in requests:
            request.priority, request.keeps_kv = new.priority, session is not None
            if before is not None and not request.continue_from(before):
                self._core.let_go(before)
            if key[0] == self._place:
                request.submitted_s = self._own[key[1]].added_s
        batch = _OpenBatch(requests, finished=self._ended, key=key, session=session)
        self._batches[key] = batch
        self._batch_of.update((id(request), batch) for request in requests)
        self._core.submit(batch)

    def _abort(self, key: Key, version: int) -> None:
        self._settle(version)
        batch = self._batches.get(key)
        if batch is None:  # it has ended by itself
            return
        unfinished = [request for request in batch.requests if request.finish_reason is None]
        self._core.abort(unfinished)
        for request in unfinished:
            request.finish_reason, request.finished_s = "abort", time.perf_counter()
            self._ended.append(request)
        self._settle(version)

    def _settle(self, version: int) -> None:
        """Take note of requests that have ended."""
        while self._ended:
            request = self._ended.popleft()
            assert isinstance(request, SampledRequest), "nothing else is added"
            batch = self._batch_of.pop(id(request))
            if batch.session is not None:
                self._last_turns[batch.session] = request
            batch.num_settled += 1
            try:
                if batch.key[0] == self._place:
                    self._tell(batch, request, version)
            finally:  # also where its tokens are no text
                if batch.num_settled == len(batch.requests):
                    place, number = batch.key
                    del self._batches[batch.key]
                    if place == self._place:
                        self._end(number)

    def _end(self, number: int) -> _Own:
        """A request of this rank is under way no longer."""
        with self._lock:
            own = self._own.pop(number)
            del self._numbers_of[own.id]
            if own.session is not None:
                own.session.turn = None
        return own

    def _tell(self, batch: _OpenBatch, request: SampledRequest, version: int) -> None:
        """Put what is new of a sample with the outputs."""
        own = self._own[batch.key[1]]
        if own.only_whole and request.finish_reason is None:
            return
        told = batch.num_told.get(request.sample_index, 0)
        new = tuple(request.sampled[told:])
        result = None
        if request.finish_reason is not None:
            if own.session is not None:
                own.session.token_ids = request.all_token_ids
                own.session.num_turns += 1
            result = request.result(self._stop_checker.text(request), version)
        elif not new:
            return
        batch.num_told[request.sample_index] = told + len(new)
        self._outputs.append(RequestOutput(own.id, request.sample_index, new, version, request.finish_reason, result))
