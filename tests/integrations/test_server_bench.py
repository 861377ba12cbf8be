"""The benchmark of the server: a quick run, and that nothing but right answers is timed."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

import server_clients
from launching import BIN, launch


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_quick_run_tells_times_and_leaves_no_card() -> None:
    finished = launch([str(BIN / "python"), "tools/bench/server.py", "--quick"], 100)
    assert finished.returncode == 0, finished
    found: dict[str, Any] = finished.summary
    assert found["card"] is None
    (seconds,) = found["seconds"].values()
    assert set(seconds) == {"generate", "clients, whole answers", "clients, streams"}
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert "Every client's token ids are those of `generate`" in finished.stderr


def received(status: str, kind: str, *parts: str) -> list[tuple[float, bytes]]:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode()
    return [(1.0, head), *((2.0 + at, part.encode()) for at, part in enumerate(parts))]


def test_a_stream_is_timed_from_its_first_event_to_its_last() -> None:
    events = [{"choices": [{"text": text, "token_ids": [at]}]} for at, text in enumerate("abc")]
    parts = [f"data: {json.dumps(event)}\n\n" for event in events]
    seen = server_clients.parsed(received("200 OK", "text/event-stream", *parts), 0.5, num_tokens=3)
    assert (seen.text, seen.token_ids, seen.ttft_s) == ("abc", [0, 1, 2], 1.5)
    assert seen.tpot_s == statistics.mean([1.0, 1.0])


@pytest.mark.parametrize(
    "answer",
    [
        received("429 Too Many Requests", "application/json", "{}"),
        received("200 OK", "text/event-stream", 'data: {"error": {"message": "a step failed"}}\n\n'),
    ],
    ids=["whole", "streamed"],
)
def test_an_error_is_not_timed(answer: list[tuple[float, bytes]]) -> None:
    with pytest.raises(RuntimeError, match=r"429|a step failed"):
        server_clients.parsed(answer, 0.0, num_tokens=3)
