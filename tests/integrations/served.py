"""A server on a small model, its steps in a thread of their own, for tests that are its clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

import cpinfer
from cpinfer_integrations.server import Server, serving
from cpinfer_integrations.server_config import ServerConfig

WITHIN_S = 60.0


@dataclass(eq=False)
class Served:
    """What a test knows of the server, and the engine behind it, on which only its own thread may step."""

    url: str
    engine: cpinfer.Engine
    wanted_end: threading.Event

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=WITHIN_S)

    def completion(self, prompt: Any, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.engine.load.num_running + self.engine.load.num_waiting == 0)


def num_streamed(lines: Iterable[str]) -> int:
    """Tokens that the lines of a stream tell of, where the request has `return_token_ids`."""
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return sum(len(event["choices"][0]["token_ids"]) for event in events)


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < until_s, "it did not come to that in time"
        time.sleep(0.005)


@contextmanager
def served(
    model: Any,
    tokenizer: Any | None,
    *,
    before: Callable[[cpinfer.Engine], Any] = lambda engine: None,
    run: Callable[[Server, threading.Event], Any] = lambda server, end: server.run_until(end.is_set),
    api_key: str | None = None,
    sampling: cpinfer.SamplingParams | None = None,
    config: ServerConfig | None = None,
    **keys: Any,
) -> Iterator[Served]:
    """The server of an engine with these keys. Whatever its thread raises is raised when the block ends."""
    started: Future[Served] = Future()
    end = threading.Event()

    def serve() -> None:
        try:
            with cpinfer.attach(model, tokenizer=tokenizer, **keys) as engine:
                before(engine)
                with serving(engine, port=0, api_key=api_key, sampling=sampling, config=config) as server:
                    started.set_result(Served(server.url, engine, end))
                    run(server, end)
                for home in engine._core.homes:
                    home.check_integrity((), {})  # no block is held by anyone but the prefix cache
            outcome.set_result(None)
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            outcome.set_exception(error)

    outcome: Future[None] = Future()
    thread = threading.Thread(target=serve, name="steps", daemon=True)
    thread.start()
    try:
        yield started.result(WITHIN_S)
    finally:
        end.set()
        thread.join(WITHIN_S)
    outcome.result(0)
