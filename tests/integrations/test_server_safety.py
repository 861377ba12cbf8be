"""Nothing that a client sends ends or stalls a server: it is answered, or refused in OpenAI's shape, or dropped."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, num_streamed, served, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer.errors import EngineFaultError, UserError
from cpinfer_integrations.server import Server, serving
from cpinfer_integrations.server_answers import Completion
from cpinfer_integrations.server_config import ServerConfig

FOLDER = Path(__file__).parents[2] / "configs" / "recall-tiny"
KEYS: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.02, "block_size": 4}
CHAT = [{"role": "user", "content": "hi"}]
LIMITS = ServerConfig(
    model_name="tiny", max_open_requests=8, max_n=4, max_prompt_tokens=64, max_body_mib=0.01, max_arrival_s=1.0
)
LONG: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 20000, "ignore_eos": True}
ERROR_KEYS = {"message", "type", "param", "code"}

pytestmark = pytest.mark.timeout(180)


def loaded() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(*loaded(), config=LIMITS, **KEYS) as found:
        yield found


def refused(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error of an answer of that status, in its shape."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == ERROR_KEYS and error["message"] and error["type"]
    assert param is None or error["param"] == param
    return error


def is_alive(server: Served) -> bool:
    return len(server.completion([5, 6], max_tokens=2, ignore_eos=True)["choices"]) == 1


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": 5}, None),
    ({"prompt": [[1], "a"]}, None),
    ({"prompt": [True]}, None),
    ({"prompt": []}, None),
    ({"prompt": ""}, None),
    ({"prompt": [1, 99999]}, None),
    ({"prompt": [-1]}, None),
    ({"prompt": "\ud800"}, None),
    ({"prompt": "a", "surprise": 1}, "surprise"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "temperature": -1}, None),
    ({"prompt": "a", "top_p": 2}, None),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 5}, "n"),
    ({"prompt": "a", "n": 10**30}, "n"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "stop": ["a"] * 65}, None),
    ({"prompt": "a", "stop": ""}, None),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "echo"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, None),
    ({"prompt": "a", "logit_bias": {"5": 1e300}}, None),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "stop_token_ids": [10**6]}, None),
    ({"prompt": "a", "stream_options": {"include": 1}}, "stream_options.include"),
    ({"prompt": ["a"] * 9}, None),
    ({"prompt": [1] * 65}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_completion_is_refused(server: Served, body: dict[str, Any], param: str | None) -> None:
    content = json.dumps(body).encode()
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    refused(answer, 400, param)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": CHAT, "top_logprobs": 3},
        {"messages": CHAT, "tools": [{"type": "function"}]},  # this template reads no tools
        {"messages": CHAT, "tool_choice": "required"},
        {"messages": CHAT, "response_format": {"type": "json_object"}},
        {"messages": CHAT, "chat_template_kwargs": {"tokenize": False}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_chat_is_refused(server: Served, body: dict[str, Any]) -> None:
    refused(server.post("/v1/chat/completions", **body), 400)


def test_what_is_not_here_is_said_not_to_be(server: Served) -> None:
    assert refused(server.post("/v1/completions", prompt="a", model="gpt"), 404, "model")["code"] == "model_not_found"
    refused(httpx.get(f"{server.url}/v1/models/gpt"), 404)
    refused(httpx.get(f"{server.url}/v2"), 404)
    refused(server.post("/v1/completions/", prompt="a"), 404)
    refused(httpx.get(f"{server.url}/v1/completions"), 405)
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["id"] == "tiny" == httpx.get(f"{server.url}/v1/models/tiny").json()["id"]
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"nul", b"[" * 5000, b'{"prompt": 1e999}', b"9" * 5000]
)
def test_a_body_that_is_no_request_is_refused(server: Served, content: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    refused(answer, 400)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_does_not_say_it_is_json_is_refused(server: Served, kind: str | None) -> None:
    """A page of another site can make a browser send these, and no others."""
    body = json.dumps({"prompt": [1, 2], "max_tokens": 1}).encode()
    headers = {} if kind is None else {"Content-Type": kind}
    error = refused(httpx.post(f"{server.url}/v1/completions", content=body, headers=headers), 415)
    assert (kind or "of no type") in error["message"] and "application/json" in error["message"]
    said = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert httpx.post(f"{server.url}/v1/completions", content=body, headers=said).status_code == 200


def test_a_body_that_is_too_large_is_refused(server: Served) -> None:
    refused(server.post("/v1/completions", prompt="a" * 2**15), 413)
    assert is_alive(server)


def test_more_than_there_is_room_for_is_told_to_come_again(server: Served) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "n": 4, "stream": True}) as first:
        lines = first.iter_lines()  # kept, as it ends the connection with itself
        next(lines)
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "n": 4, "stream": True}) as second:
            more_lines = second.iter_lines()
            next(more_lines)
            answer = server.post("/v1/completions", prompt="a")
            assert refused(answer, 429)["type"] == "rate_limit_error" and int(answer.headers["Retry-After"]) > 0
    server.wait_until_idle()
    wait_until(lambda: server.post("/v1/completions", prompt="a").status_code == 200)


def test_a_request_that_does_not_arrive_is_dropped_and_keeps_nobody_waiting(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    begun = [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"]
    silent = [socket.create_connection((host, int(port))) for _ in range(20) for _ in begun]
    for i, connection in enumerate(silent):
        connection.sendall(begun[i % len(begun)])
    assert is_alive(server)
    for connection in silent:
        connection.settimeout(30)
        answer = b""
        while part := connection.recv(1000):
            answer += part
            if b"max_arrival_s" in answer:
                break
        assert not answer or answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))
        connection.close()


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what a client does not read stays there
    connection.connect((host, int(port)))
    connection.settimeout(15)
    return connection


def posted(path: str = "/v1/completions", **body: Any) -> bytes:
    content = json.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return f"{head}{content}".encode()


def all_that_comes(connection: socket.socket) -> bytes:
    """Until the server ends the connection. TimeoutError when it does not."""
    parts = []
    try:
        while part := connection.recv(2**20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_further_requests_of_a_connection_have_no_more_time_to_arrive_than_its_first(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(posted(prompt=[1], max_tokens=1))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /v1/mod")
        all_that_comes(connection)


def test_a_body_that_is_late_is_not_waited_for_any_longer(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(posted(prompt=[1]).replace(b"Length: 1", b"Length: 91"))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408 ")
        for _ in range(80):
            try:
                connection.sendall(b" ")
            except ConnectionError:
                return
            time.sleep(0.1)
    raise AssertionError("it is still read")


# To `/tokenize`; the answer is more than a machine keeps for a connection.
LARGE = "é" * 800_000


def test_who_does_not_take_an_answer_is_dropped() -> None:
    with served(*loaded(), config=ServerConfig(max_request_s=0.5), **KEYS) as found, connected(found) as connection:
        connection.sendall(posted("/tokenize", prompt=LARGE))
        taken = connection.recv(1024)
        time.sleep(2)
        taken += all_that_comes(connection)
        assert taken.startswith(b"HTTP/1.1 200 ")
        assert len(taken) < len(found.post("/tokenize", prompt=LARGE).content)


def test_who_takes_nothing_and_who_sends_nothing_does_not_keep_a_server_from_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served(*loaded(), **KEYS) as found:
        idle, slow, silent = connected(found), connected(found), connected(found)
        idle.sendall(posted(prompt=[1], max_tokens=1))
        slow.sendall(posted("/tokenize", prompt=LARGE))
        silent.sendall(posted(prompt=[1])[:-1])
        for connection in (idle, slow):
            assert connection.recv(1).startswith(b"H")
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 8 and "uvicorn" not in caplog.text
    for connection in (idle, slow, silent):
        all_that_comes(connection)
        connection.close()


def fuzzed(draw: random.Random) -> tuple[str, bytes]:
    """A path, and a body of it with values that nobody expects in some of its fields."""
    values: list[Callable[[], Any]] = [
        lambda: None,
        lambda: draw.choice([True, False]),
        lambda: draw.choice([0, 1, -1, 2, 3, 2**31, 2**64, 10**25, 0.5, -0.0, 1e-9, 1e308]),
        lambda: draw.choice(["", "a", "stop", "\u0000", "\ud83d", "é" * 50, "</s>", "{{ x }}"]),
        lambda: [draw.choice(values[:4])() for _ in range(draw.randrange(4))],
        lambda: {
            draw.choice(["role", "content", "5", "type", "x"]): draw.choice(values)() for _ in range(draw.randrange(3))
        },
    ]
    names = "temperature top_p n seed stop stream logit_bias top_k min_p repetition_penalty min_tokens stop_token_ids "
    names += (
        "ignore_eos return_token_ids logprobs echo user stream_options model presence_penalty best_of suffix tools "
    )
    names += "top_logprobs tool_choice response_format chat_template_kwargs add_special_tokens prompt messages tokens"
    good: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "a b", "max_tokens": 3}),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1, 2]}),
    ]
    path, body = draw.choice(good)
    body = {**body, **{name: draw.choice(values)() for name in draw.sample(names.split(), draw.randrange(1, 4))}}
    content = json.dumps(body).encode()
    if draw.random() < 0.1:
        place = draw.randrange(len(content))
        content = content[:place] + bytes([draw.randrange(256)]) + content[place + draw.randrange(3) :]
    return path, content


def fuzz(server: Served, seed: int, num_requests: int) -> None:
    draw = random.Random(seed)
    statuses = set()
    with httpx.Client(timeout=60) as http:
        for _ in range(num_requests):
            path, content = fuzzed(draw)
            answer = http.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 404, 429), (path, content, answer.text)
            if answer.status_code != 200:
                refused(answer, answer.status_code)
    assert {200, 400} <= statuses
    server.wait_until_idle()
    assert is_alive(server)


def test_requests_of_any_shape_are_answered_or_refused(server: Served) -> None:
    fuzz(server, 0, 300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_requests_of_any_shape_are_answered_or_refused(server: Served, seed: int) -> None:
    fuzz(server, seed, 2000)


def test_who_lacks_the_key_is_refused() -> None:
    with served(*loaded(), api_key="sesame", **KEYS) as found:
        for headers in (
            {},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer \u00e9"},
        ):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = httpx.get(f"{found.url}{path}", headers={k: v.encode() for k, v in headers.items()})
                assert refused(answer, 401)["code"] == "invalid_api_key"
        assert httpx.get(f"{found.url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert httpx.get(f"{found.url}/health").status_code == 200


def test_a_request_that_takes_too_long_is_told_so_and_aborted() -> None:
    with served(*loaded(), config=ServerConfig(max_request_s=0.3), **KEYS) as found:
        refused(found.post("/v1/completions", **LONG), 504)
        with httpx.stream("POST", f"{found.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"].keys() == ERROR_KEYS
        found.wait_until_idle()


def test_logs_hold_no_prompts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), served(*loaded(), **KEYS) as found:
        found.completion("a secret word", max_tokens=2)
        refused(found.post("/v1/completions", prompt="a secret word", n=0), 400)
        refused(found.post("/v1/chat/completions", messages=[{"role": 1, "content": "a secret word"}]), 400)
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_told_without_its_words_and_logged_without_them(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError("a secret word")

    monkeypatch.setattr(Completion, "chunk" if stream else "choice", broken)
    with caplog.at_level(logging.DEBUG), served(*loaded(), **KEYS) as found:
        answer = found.post("/v1/completions", prompt="a", stream=stream)
        error = json.loads(answer.text.removeprefix("data: "))["error"]
        assert answer.status_code == (200 if stream else 500) and error["type"] == "server_error"
        monkeypatch.undo()
        found.wait_until_idle()
        assert is_alive(found)
    assert "secret" not in caplog.text + answer.text
    assert "LookupError" in answer.text and "a request failed: LookupError in " in caplog.text


def test_a_step_that_fails_takes_its_requests_along_and_nothing_else() -> None:
    fails = threading.Event()

    def run(server: Server, end: threading.Event) -> None:
        core = server._engine._core
        advance = core.advance

        def failing(*args: Any) -> Any:
            if fails.is_set() and server._engine.load.num_running:
                fails.clear()
                with core.all_or_cut():
                    raise EngineFaultError("logits are not finite")
            return advance(*args)

        core.advance = failing  # type: ignore[method-assign]
        server.run_until(end.is_set)

    with served(*loaded(), run=run, **KEYS) as found:
        with httpx.stream("POST", f"{found.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            fails.set()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        fails.set()
        refused(found.post("/v1/completions", **LONG), 500)
        assert is_alive(found)


def test_clients_of_a_job_that_fails_get_an_error_and_do_not_hang() -> None:
    def run(server: Server, end: threading.Event) -> None:
        def fails() -> bool:
            if end.is_set():
                raise OSError("the job has other worries")
            return False

        server.run_until(fails)

    def until_it_fails() -> None:
        streamed = {**LONG, "stream": True}
        with (
            served(*loaded(), run=run, **KEYS) as found,
            httpx.stream("POST", f"{found.url}/v1/completions", json=streamed) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            found.wanted_end.set()
            last.extend(line for line in lines if line)

    last: list[str] = []
    with pytest.raises(OSError, match="other worries"):
        until_it_fails()
    assert "OSError" in json.loads(last[-1].removeprefix("data: "))["error"]["message"]


def test_open_requests_end_before_the_server_does_and_new_ones_are_refused() -> None:
    with served(*loaded(), **KEYS) as found:
        with httpx.stream(
            "POST",
            f"{found.url}/v1/completions",
            json={**LONG, "max_tokens": 600, "stream": True, "return_token_ids": True},
        ) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            found.wanted_end.set()
            wait_until(lambda: httpx.get(f"{found.url}/health").status_code == 503)
            told = found.post("/v1/completions", prompt="a")
            assert "ending" in refused(told, 503)["message"] and told.headers["Retry-After"]
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and num_streamed([first, *rest]) == 600


def test_what_does_not_end_in_time_is_aborted_and_told() -> None:
    with served(*loaded(), config=ServerConfig(max_drain_s=0.2), **KEYS) as found:
        with httpx.stream("POST", f"{found.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            found.wanted_end.set()
            last = [line for line in lines if line][-1]
        assert "ending" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_an_agent_runs_beside_the_steps_and_its_error_is_the_calls() -> None:
    model, tokenizer = loaded()
    with cpinfer.attach(model, tokenizer=tokenizer, **KEYS) as engine, serving(engine, port=0) as server:
        url = server.run(lambda url: httpx.get(f"{url}/v1/models").json() and url)
        assert url == server.url and server.run() is None
        with pytest.raises(ZeroDivisionError):
            server.run(lambda url: 1 / 0)
        engine.generate([1, 2, 3])  # between two runs the engine is the job's
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url)


def test_where_a_server_cannot_listen_it_says_so() -> None:
    model, tokenizer = loaded()
    with socket.create_server(("127.0.0.1", 0)) as taken, cpinfer.attach(model, tokenizer=tokenizer, **KEYS) as engine:
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("no.such.host.invalid", 0), ("a" * 70, 0)):
            with pytest.raises(UserError, match="cannot listen"), serving(engine, host, port):
                raise AssertionError("it listens")


def test_a_model_without_a_tokenizer_takes_token_ids() -> None:
    model, _ = loaded()
    with served(model, None, **KEYS) as found:
        body = {"max_tokens": 2, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
        (choice,) = found.completion([1, 2, 3], **body)["choices"]
        assert choice["text"] == "" and len(choice["token_ids"]) == 2
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        for body in ({"prompt": "a"}, {"prompt": [1], "stop": "a"}):
            refused(found.post("/v1/completions", **body), 400)
        refused(found.post("/v1/chat/completions", messages=CHAT), 400)
        refused(found.post("/tokenize", prompt="a"), 400)


def test_the_server_is_found_by_others_only_where_it_is_told_to() -> None:
    assert ServerConfig().host == "127.0.0.1"
    started_s = time.monotonic()
    with served(*loaded(), config=ServerConfig(host="0.0.0.0"), **KEYS) as found:
        port = int(found.url.rpartition(":")[2])
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert time.monotonic() - started_s < 20
