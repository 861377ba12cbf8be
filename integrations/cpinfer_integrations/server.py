"""A token server inside a job: OpenAI's HTTP interface to an engine, answered by the first rank, computed by all.

    with rollout_phase(lend(model)) as engine, serving(engine) as server:
        answers = server.run(agent)      # on every rank: agent(server.url) in a thread, steps in this one

Agents and other clients speak HTTP to the first rank of the replica. Its main thread steps with the other ranks, and a
thread beside it runs the event loop of uvicorn. The weights are those of the engine: there is no copy and no transfer.

Clients that outlive a phase find a server that does so too:

    with rollout_phase(lend(model)) as engine:
        ...
    with serving(engine) as server:      # that phase is over: requests wait
        ...                              # train
        with rollout_phase(lend(model)) as engine, server.answered_by(engine):
            server.run_until(has_enough)
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from cpinfer.comm.losses import is_peer_loss
from cpinfer.config import SamplingParams
from cpinfer.engine.engine import Engine
from cpinfer.engine.open_requests import RequestOutput
from cpinfer.errors import EngineFaultError, UserError
from cpinfer.packages import named
from cpinfer_integrations.job_ranks import all_gather_object, on_all_ranks
from cpinfer_integrations.server_config import ServerConfig

try:
    import uvicorn

    from cpinfer_integrations.server_app import Api, make_app
    from cpinfer_integrations.server_bridge import Bridge
    from cpinfer_integrations.server_control import Control, Pause
    from cpinfer_integrations.server_protocol import ImpatientProtocol
    from cpinfer_integrations.server_text import ServerTokenizer
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["Server", "serving"]

T = TypeVar("T")

# How long uvicorn may take to start, and to send what it still has when it ends.
_START_S = 30.0
_FLUSH_S = 2.0


class Server:
    """A server on one rank of its replica: the first one answers, all step. Made by `serving`.

    `url` is where it listens, the same on every rank.
    """

    def __init__(self, engine: Engine, url: str, http: _Http | None, max_drain_s: float) -> None:
        self.url = url
        self._engine = engine
        self._http = http
        self._max_drain_s = max_drain_s

    @contextmanager
    def answered_by(self, engine: Engine) -> Iterator[Server]:
        """In the block this engine answers. Collective over the replica.

        When it ends, requests under way end first, within `max_drain_s`; what comes meanwhile waits for the next block.

        Args:
            engine: awake, on the ranks of the one that the server was made with.

        Yields:
            This server.
        """
        self._engine = engine
        if self._http is not None:
            self._http.bridge.go_on(engine)
        try:
            yield self
            if self._http is not None:
                self._http.bridge.hold()
            self._end_open()
        except BaseException as error:
            if self._http is not None:
                self._http.fail(error)
            raise

    def run(self, agent: Callable[[str], T] | None = None) -> T | None:
        """Run agents while the engine answers them. Collective over the job.

        Args:
            agent: called with `url`, in a thread of its own; each rank may have one, or none. Only this thread may
                touch the engine meanwhile, and no agent may communicate with other ranks.

        Returns:
            What it returned; None without one.

        Raises:
            Exception: what it raised. UserError on the other ranks, which quotes the first that failed.
        """
        work: Future[T | None] = Future()
        if agent is None:
            work.set_result(None)
        else:
            threading.Thread(target=_complete, args=(work, agent, self.url), name="agent", daemon=True).start()
        self.run_until(work.done)
        return _on_all_ranks(self._engine, work.result, "run its agent")

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Answer clients until `is_done`, asked after every step, is true on every rank. Collective over the replica.

        A step that fails on all ranks alike ends the requests that were under way, and nothing else.

        Args:
            is_done: whether this rank has all it wants.
        """

        def condition(outputs: list[RequestOutput]) -> bool:
            if self._http is not None:
                self._http.hand_over(outputs)
            return is_done()

        while True:
            try:
                with nullcontext() if self._http is None else self._http.pause.steps():
                    return self._engine.run_until(condition)
            except EngineFaultError as fault:
                self._engine.topology.logger(__name__).shared("a step failed, and its requests with it: %s", fault)

    def drain(self) -> None:
        """Take no more requests, and let those that are open end, within `max_drain_s`. Collective over the replica."""
        if self._http is not None:
            self._http.bridge.close("the server is ending; it takes no more requests.")
        self._end_open()

    def _end_open(self) -> None:
        http, until_s = self._http, time.monotonic() + self._max_drain_s

        def is_empty() -> bool:
            if http is None:
                return True
            if time.monotonic() > until_s:
                http.bridge.abort_all()
            return http.bridge.num_open == 0

        self.run_until(is_empty)


@contextmanager
def serving(
    engine: Engine,
    host: str | None = None,
    port: int | None = None,
    *,
    api_key: str | None = None,
    sampling: SamplingParams | None = None,
    config: ServerConfig | None = None,
    shares_weights: bool = True,
) -> Iterator[Server]:
    """OpenAI's HTTP interface to an engine, for the length of the block. Collective over the job.

    Nobody is answered while the main threads of the ranks do something else: they step in `Server.run`, `run_until`.
    When the block ends, open requests end first.

    Args:
        engine: as `rollout_phase` and `attach` give it. One whose phase is over tells of the model alone: requests wait
            until another answers, by `Server.answered_by`.
        host: address to listen at; default: that of `config`.
        port: 0 for any that is free; default: that of `config`.
        api_key: what clients have to name in `Authorization: Bearer KEY`; without one everybody is let in.
        sampling: how samples are drawn where a request does not say; default: `SamplingParams()`.
        config: limits, and the model's name.
        shares_weights: whether the weights are those that are trained. A client that wants to send them, as to vLLM, is
            then told that 0 bytes are wanted; else it is refused.

    Yields:
        The server. Its `url` ends without a slash; for OpenAI's clients `base_url` is f"{url}/v1".

    Raises:
        UserError: on every rank, when a server cannot listen there.
    """
    config = config or ServerConfig()
    config = replace(config, host=config.host if host is None else host, port=config.port if port is None else port)
    started: list[_Http] = []  # on the first rank of a replica, when it listens
    params = sampling or SamplingParams()

    def start() -> str:
        if engine.topology.is_writer:
            started.append(_Http(engine, config, api_key, params, shares_weights))
        return started[0].url if started else ""

    try:
        url = _on_all_ranks(engine, start, "listen")
        if engine.topology.grid.world_size > 1:
            url = all_gather_object(url)[engine.topology.replica_ranks[0]]
        server = Server(engine, url, started[0] if started else None, config.max_drain_s)
        if engine.is_awake:
            with server.answered_by(engine):
                yield server
                server.drain()
        else:
            yield server
        for http in started:
            http.bridge.fail("the server has ended.")  # those that no engine answered
    except BaseException as error:
        for http in started:
            http.fail(error)
        raise
    finally:
        for http in started:
            http.stop()


class _Http:
    """uvicorn in a thread of its own. UserError where it cannot listen."""

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        api_key: str | None,
        sampling: SamplingParams,
        shares_weights: bool,
    ) -> None:
        self.bridge = Bridge(engine, config)
        self.pause = Pause(config.max_pause_s)
        api = Api(self.bridge, ServerTokenizer(engine.tokenizer), config, sampling, int(time.time()))
        control = Control(self.bridge, self.pause, shares_weights=shares_weights)
        options: dict[str, Any] = {"log_config": None, "access_log": False, "ws": "none", "loop": "asyncio"}
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(api, control, api_key),
                http=ImpatientProtocol.within(
                    max_headers_s=config.max_arrival_s, max_unread_s=config.max_request_s, flush_s=_FLUSH_S
                ),
                timeout_graceful_shutdown=int(_FLUSH_S) + 1,  # then nobody is left, whom uvicorn would drop noisily
                server_header=False,
                **options,
            )
        )
        self._socket = _listen(config.host, config.port and config.port + engine.topology.coords.dp_rank)
        address, port = self._socket.getsockname()[:2]
        address = socket.gethostname() if address in ("0.0.0.0", "::") else address
        self.url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="http", daemon=True)
        self._thread.start()
        until_s = time.monotonic() + _START_S
        while not self._server.started and self._thread.is_alive() and time.monotonic() < until_s:
            time.sleep(0.005)
        if not self._server.started:
            raise RuntimeError("uvicorn did not start; its log says why")

    def hand_over(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand outputs to the event loop, and wait while clients want a pause. RuntimeError when it has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the thread of the HTTP server has ended; its log says why")
        self.bridge.hand_over(outputs)
        self.pause.wait()

    def fail(self, error: BaseException) -> None:
        """Tell all who wait that this has ended the job's part of it."""
        cause = "because another rank ended" if is_peer_loss(error) else f"with a {type(error).__name__}"
        self.bridge.fail(f"the server has ended {cause}.")

    def stop(self) -> None:
        """End the server when it has sent what it still has."""
        self._server.should_exit = True
        self._thread.join(2 * _FLUSH_S)
        self._socket.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"the server cannot listen at {host}, port {port}: {said}. Name another host or port."
        ) from error
    return listener


def _complete(work: Future[T | None], agent: Callable[[str], T], url: str) -> None:
    """The body of an agent's thread: it always comes to an end that the main thread sees."""
    try:
        work.set_result(agent(url))
    except Exception as error:
        work.set_exception(error)
    except BaseException as error:  # in a thread `sys.exit` ends nothing but the thread, for which all would wait
        died = RuntimeError(f"an agent ended its thread with {error!r}")
        died.__cause__ = error
        work.set_exception(died)


def _on_all_ranks(engine: Engine, act: Callable[[], T], what: str) -> T:
    """`on_all_ranks`, where the engine spans the job; an engine of one rank may be served by that rank alone."""
    return act() if engine.topology.grid.world_size == 1 else on_all_ranks(act, what)
