"""Between HTTP and the engine: routes ask on the event loop of a thread, the main thread steps.

event loop    a route asks  -> Engine.add            ... awaits ...          outputs -> the routes that wait for them
main thread                    step step step step   hands outputs over  ->

Where engines follow each other, as in phases of a training, requests that come between them are held for the next one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field

from cpinfer.config import SamplingParams
from cpinfer.engine.engine import Engine
from cpinfer.engine.open_requests import RequestOutput
from cpinfer.errors import UserError
from cpinfer_integrations.server_config import ServerConfig
from cpinfer_integrations.server_errors import ApiError
from cpinfer_integrations.server_metrics import Metrics

# How long the event loop may take to do what another thread asks of it.
_LOOP_S = 60.0


@dataclass(eq=False)
class _Run:
    """A request of the engine, its outputs so far, and who waits for them: each with the place of the prompt there."""

    id: str
    token_ids: Sequence[int]
    params: SamplingParams
    only_whole: bool
    began_s: float = 0.0
    outputs: list[RequestOutput] = field(default_factory=list)
    readers: list[tuple[Answers, int]] = field(default_factory=list)
    num_ended: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Answers:
    """What one HTTP request waits for: the samples of its prompts. Whoever has it leaves it in the end."""

    def __init__(self, bridge: Bridge, num_samples: int, max_s: float, *, in_pieces: bool) -> None:
        self._bridge = bridge
        self._num_open = num_samples
        self._in_pieces = in_pieces
        self._untaken: list[tuple[int, RequestOutput]] = []
        self._failure: ApiError | None = None
        self._has_news = asyncio.Event()
        late = ApiError(504, "the request took longer than this server allows (max_request_s).")
        self._timer = asyncio.get_running_loop().call_later(max_s, self.fail, late)
        self.runs: list[_Run] = []

    def put(self, place: int, output: RequestOutput) -> None:
        """Hand over an output of the prompt at `place`, where it is one that is waited for."""
        if self._in_pieces or output.finish_reason is not None:
            self._untaken.append((place, output))
            self._has_news.set()

    def fail(self, error: ApiError) -> None:
        """Say why there will be no more."""
        self._failure = self._failure or error
        self._has_news.set()

    async def outputs(self) -> AsyncIterator[list[tuple[int, RequestOutput]]]:
        """Outputs as they come, each with the place of its prompt, until all samples have ended.

        Whoever takes them too slowly gets more at a time.

        Raises:
            ApiError: when that takes too long, a step failed, or the server ends first.
        """
        while self._num_open:
            await self._has_news.wait()
            self._has_news.clear()
            found, self._untaken = self._untaken, []
            for _, output in found:
                if output.finish_reason in ("abort", "error"):
                    raise self._bridge.why_not(output.finish_reason)
                self._num_open -= output.finish_reason is not None
            if found:
                yield _joined(found)
            if self._num_open and self._failure is not None:
                raise self._failure

    def leave(self) -> None:
        """Wait for nothing any more: what nobody else waits for is aborted."""
        self._timer.cancel()
        for run in self.runs:
            run.readers = [(reader, place) for reader, place in run.readers if reader is not self]
            self._bridge.abort_unread(run)
        self.runs = []


class Bridge:
    """The requests that clients have under way. Methods are called on the event loop, unless they say otherwise.

    `engine` is the one that answers, or did so last. At first none does: requests are held until `go_on`. Of `config`
    it keeps `max_open_requests`, `max_request_s` and `stream_interval_s`.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.metrics = Metrics(lambda: self.engine)
        self._config = config
        self._runs: dict[str, _Run] = {}
        self._held: dict[str, _Run] | None = {}  # those of them that no engine has; None while one answers
        self._num_samples = 0
        self._refusal: ApiError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Of the thread that steps: outputs that the event loop has not been told of, and from when on it is.
        self._untold: list[RequestOutput] = []
        self._due_s = 0.0

    def start(self) -> None:
        """Remember the event loop that runs now."""
        self._loop = asyncio.get_running_loop()

    @property
    def num_open(self) -> int:
        """Requests that the engine has, whose last output has not been handed on. From any thread."""
        return len(self._runs) - len(self._held or ())

    @property
    def is_ready(self) -> bool:
        return self._refusal is None

    async def ask(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, is_seeded: bool, in_pieces: bool
    ) -> Answers:
        """Queue the prompts of one HTTP request.

        Args:
            prompts: token ids.
            params: for all of them.
            is_seeded: whether the same request shall draw the same samples again; one that is under way is shared.
            in_pieces: whether all outputs are wanted; else the last of each sample, which has all of it.

        Returns:
            Their answers, to be left in the end.

        Raises:
            ApiError: when there is no room now, or never. UserError: as `Engine.add` has it.
        """
        answers = Answers(self, len(prompts) * params.n, self._config.max_request_s, in_pieces=in_pieces)
        try:
            for place, token_ids in enumerate(prompts):
                request_id = _id_of(token_ids, params) if is_seeded else f"request-{secrets.token_hex(16)}"
                only_whole = not (in_pieces or is_seeded)  # who comes later may want a stream of a seeded one
                await self._join(answers, place, _Run(request_id, token_ids, params, only_whole))
        except BaseException:
            answers.leave()
            raise
        return answers

    async def _join(self, answers: Answers, place: int, wanted: _Run) -> None:
        """Wait for a run like the `wanted` one: that which is under way by its name, else itself."""
        while (run := self._runs.get(wanted.id)) is not None and not run.readers:
            await run.ended.wait()  # it is being aborted, and its name not free yet
        if self._refusal is not None:
            raise self._refusal
        if run is None:
            run = self._begin(wanted)
        for output in run.outputs:
            answers.put(place, output)
        run.readers.append((answers, place))
        answers.runs.append(run)

    def _begin(self, run: _Run) -> _Run:
        params = run.params
        if self._num_samples + params.n > self._config.max_open_requests:
            raise ApiError(
                429,
                f"{self._num_samples} samples are under way and {params.n} were asked for; this server takes "
                f"{self._config.max_open_requests} at a time. Try again.",
                kind="rate_limit_error",
                headers={"Retry-After": "1"},
            )
        run.began_s = time.perf_counter()
        self._runs[run.id] = run  # before the engine has it: an output may come at once
        try:
            if self._held is None:
                self._add(run)
            else:
                self._held[run.id] = run
        except BaseException:
            del self._runs[run.id]
            raise
        self._num_samples += params.n
        self.metrics.num_prompt_tokens.inc(len(run.token_ids))
        return run

    def _add(self, run: _Run) -> None:
        prompt = {"prompt_token_ids": list(run.token_ids), "id": run.id}
        self.engine.add(prompt, run.params, only_whole=run.only_whole)

    def abort_unread(self, run: _Run) -> None:
        """End a request that nobody waits for."""
        if run.readers or run.id not in self._runs:
            return
        if self._held and run.id in self._held:
            self._drop(run)
        else:
            self.engine.abort(run.id)

    def why_not(self, finish_reason: str) -> ApiError:
        """What to tell a client whose request was taken away."""
        if finish_reason == "error":
            return ApiError(500, "a step of the model failed, and took this request along.", kind="server_error")
        return self._refusal or ApiError(503, "the request was aborted.", kind="server_error")

    def hand_over(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand outputs of a step to those who wait for them. On the thread that steps.

        Those of several steps travel together within `stream_interval_s`, unless a sample has ended: to wake the event
        loop, and it each client, takes more processor time than to sample a token of a small model does.
        """
        self._untold += outputs
        now_s = time.perf_counter()
        is_due = now_s >= self._due_s or any(output.finish_reason is not None for output in outputs)
        if self._untold and is_due:
            assert self._loop is not None, "who asks has a loop"
            untold, self._untold, self._due_s = self._untold, [], now_s + self._config.stream_interval_s
            self._loop.call_soon_threadsafe(self._deliver, untold)

    def go_on(self, engine: Engine) -> None:
        """From now on this engine answers, those first that have been held. On the thread that steps."""

        def add_held() -> None:
            held, self._held, self.engine = self._held or {}, None, engine
            for run in held.values():
                try:
                    self._add(run)
                except UserError as error:  # its sizes may be other than those of the engine before it
                    self._drop(run, ApiError(400, str(error)))

        self._on_loop(add_held)

    def hold(self) -> None:
        """From now on hold what comes for the next engine. On the thread that steps."""

        def hold() -> None:
            self._held = {}

        self._on_loop(hold)

    def _on_loop(self, act: Callable[[], None]) -> None:
        """Do it on the event loop, and come back when it is done."""

        async def run() -> None:
            act()

        assert self._loop is not None, "it listens"
        asyncio.run_coroutine_threadsafe(run(), self._loop).result(_LOOP_S)

    def close(self, why: str) -> None:
        """Take no more requests. From any thread."""
        self._refusal = ApiError(503, why, kind="server_error", headers={"Retry-After": "1"})

    def abort_all(self) -> None:
        """End all that the engine has. On the thread that steps."""
        for request_id in [*self._runs.keys() - (self._held or {}).keys()]:
            self.engine.abort(request_id)

    def fail(self, why: str) -> None:
        """There will be no more outputs: tell all who wait. On the thread that steps."""
        self.close(why)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drop_all)

    def _drop_all(self) -> None:
        for run in list(self._runs.values()):
            self._drop(run, self.why_not("abort"))

    def _drop(self, run: _Run, error: ApiError | None = None) -> None:
        """Forget a request that no engine has any more, and tell those who wait for it."""
        del self._runs[run.id]
        if self._held is not None:
            self._held.pop(run.id, None)
        self._num_samples -= run.params.n - run.num_ended
        for answers, _ in run.readers:
            assert error is not None, "who waits is told why"
            answers.fail(error)
        run.ended.set()

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        now_s = time.perf_counter()
        for output in outputs:
            run = self._runs.get(output.request_id)
            if run is not None:  # else the phase's own code has added it
                self._take(run, output, now_s)

    def _take(self, run: _Run, output: RequestOutput, now_s: float) -> None:
        run.outputs.append(output)
        if output.finish_reason is not None:
            run.num_ended += 1
            self._num_samples -= 1
            self.metrics.ended(output.finish_reason, output.result, now_s - run.began_s)
        for answers, place in run.readers:
            answers.put(place, output)
        if run.num_ended == run.params.n:
            del self._runs[run.id]
            run.ended.set()


def _joined(found: Sequence[tuple[int, RequestOutput]]) -> list[tuple[int, RequestOutput]]:
    """Outputs of a sample in a row as one, where the same weights sampled them."""
    joined: dict[tuple[int, int, int], RequestOutput] = {}
    for place, output in found:
        key = place, output.sample_index, output.weights_version
        before = joined.get(key)
        joined[key] = output if before is None else output._replace(tokens=before.tokens + output.tokens)
    return [(place, output) for (place, _, _), output in joined.items()]


def _id_of(token_ids: Sequence[int], params: SamplingParams) -> str:
    """The name of a request whose samples are to be the same whenever it is asked for."""
    asked = json.dumps([list(token_ids), asdict(params)], sort_keys=True)
    return f"seeded-{hashlib.sha256(asked.encode()).hexdigest()}"
