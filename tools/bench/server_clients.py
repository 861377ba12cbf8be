"""Clients of OpenAI's completions, all at once, in a process of their own: what each was sent, and when.

    python tools/bench/server_clients.py < ASKED > SEEN

ASKED is `{"url": ..., "bodies": [...]}`: each body is sent by a client of its own, over a connection that is open
before the clock starts; SEEN, one JSON object on the last line, has `taken_s`, from the first body sent to the last
byte of the last answer, `cpu_s`, the clients' own processor time meanwhile, and of each client its `Seen`. While the
clock runs nothing is parsed: bytes are kept with the time at which they came, since whoever measures a server on its
own cores takes them from it.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPResponse
from typing import Any, cast
from urllib.parse import urlsplit

# How long the server may take for all of them.
_WITHIN_S = 300.0


@dataclass(frozen=True)
class Seen:
    """What one client was sent: its text and, where asked for, token ids; seconds from its asking to the first text.

    `tpot_s` is the mean from the first event of a stream to the last, over the tokens behind the first. Both are None
    where the answer came whole.
    """

    text: str
    token_ids: list[int] | None
    ttft_s: float | None
    tpot_s: float | None


class Client(asyncio.Protocol):
    """A connection that keeps what it receives until the server closes it."""

    def __init__(self) -> None:
        self.received: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.received.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)


def main() -> int:
    asked = json.load(sys.stdin)
    taken_s, cpu_s, seen = asyncio.run(ask_all(asked["url"], asked["bodies"]))
    print(json.dumps({"taken_s": taken_s, "cpu_s": cpu_s, "seen": [asdict(one) for one in seen]}), flush=True)
    return 0


async def ask_all(url: str, bodies: Sequence[Mapping[str, Any]]) -> tuple[float, float, list[Seen]]:
    """Send all bodies at once; the seconds that their answers took together, and this process, and what each saw."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    loop = asyncio.get_running_loop()
    connections = [await loop.create_connection(Client, host, port) for _ in bodies]
    requests = [request_bytes(f"{host}:{port}", body) for body in bodies]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for (transport, _), request in zip(connections, requests, strict=True):
        cast(asyncio.WriteTransport, transport).write(request)
    async with asyncio.timeout(_WITHIN_S):
        await asyncio.gather(*(client.closed for _, client in connections))
    cpu_s = time.process_time() - start_cpu_s
    seen = [
        parsed(client.received, start_s, body["max_tokens"])
        for (_, client), body in zip(connections, bodies, strict=True)
    ]
    return max(client.received[-1][0] for _, client in connections) - start_s, cpu_s, seen


def request_bytes(host: str, body: Mapping[str, Any]) -> bytes:
    """A request after whose answer the server closes the connection."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def parsed(received: Sequence[tuple[float, bytes]], start_s: float, num_tokens: int) -> Seen:
    """What an answer of `num_tokens` says. RuntimeError for one that is an error."""
    response = HTTPResponse(cast(socket.socket, _Received(b"".join(data for _, data in received))))
    response.begin()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status} {response.reason}: {content[:500]!r}")
    if response.headers.get_content_type() != "text/event-stream":
        choice = json.loads(content)["choices"][0]
        return Seen(choice["text"], choice.get("token_ids"), None, None)
    events = [json.loads(line[6:]) for line in content.split(b"\n") if line.startswith(b"data: {")]
    if failed := [event for event in events if "error" in event]:
        raise RuntimeError(f"a stream ended with {failed[0]}")
    choices = [event["choices"][0] for event in events if event["choices"]]
    token_ids = None
    if "token_ids" in choices[0]:
        token_ids = [token for choice in choices for token in choice["token_ids"] or ()]
    came_s = [at_s for at_s, data in received if b"data: {" in data]
    tpot_s = (came_s[-1] - came_s[0]) / (num_tokens - 1)
    return Seen("".join(choice["text"] for choice in choices), token_ids, came_s[0] - start_s, tpot_s)


class _Received:
    """What a response is read from, in place of a socket."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)


if __name__ == "__main__":
    sys.exit(main())
