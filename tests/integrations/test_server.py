"""The server gives what the engine gives, to OpenAI's own client, whole and in streams; who is gone costs nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Served, num_streamed, served
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import add_response_schema

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer.engine.request import RolloutResult
from cpinfer_integrations.server_config import ServerConfig
from tool_models import chats, follow, tool_model, tool_tokenizer

FOLDER = Path(__file__).parents[2] / "configs" / "recall-tiny"
PROMPT = "Alice sells bridges. Boris sells boats. Alice sells"
KEYS: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.02, "block_size": 4}
TOP, SEED = 3, 7
FOLLOW = {
    "type": "function",
    "function": {
        "name": "follow",
        "description": follow.__doc__,
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}

pytestmark = pytest.mark.timeout(180)


def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def direct() -> dict[str, RolloutResult]:
    """What the engine itself gives; filled in before the server starts."""
    return {}


@pytest.fixture(scope="module")
def server(tokenizer: Any, direct: dict[str, RolloutResult]) -> Iterator[Served]:
    def ask(engine: cpinfer.Engine) -> None:
        greedy = SamplingParams(temperature=0, max_new_tokens=12, top_logprobs=TOP, prompt_logprobs=True)
        direct["greedy"] = engine.generate(PROMPT, greedy)[0]
        direct["chat"] = engine.generate([{"role": "user", "content": PROMPT}], greedy)[0]

    with served(loaded(), tokenizer, before=ask, **KEYS) as found:
        yield found


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_completion_is_the_engines_own_token_for_token(
    client: openai.OpenAI, direct: dict[str, RolloutResult]
) -> None:
    expected = direct["greedy"]
    extra = {"return_token_ids": True}
    told = client.completions.create(
        model="policy", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=TOP, echo=True, extra_body=extra
    )
    choice: Any = told.choices[0]
    assert expected.text and choice.text == PROMPT + expected.text
    assert tuple(choice.token_ids) == expected.token_ids
    assert tuple(choice.prompt_token_ids) == expected.prompt_token_ids
    assert choice.finish_reason == expected.finish_reason
    assert choice.weights_versions == [[0, len(expected.token_ids)]]
    assert expected.prompt_logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx([*expected.prompt_logprobs, *expected.logprobs], abs=1e-5)
    for found, top in zip(choice.logprobs.top_logprobs[-12:], expected.top_logprobs or (), strict=True):
        assert max(found.values()) == pytest.approx(top[0][1], abs=1e-5)
    usage = told.usage
    assert usage is not None and usage.total_tokens == len(expected.prompt_token_ids) + len(expected.token_ids)


def test_token_ids_in_are_the_prompt_and_several_prompts_have_their_choices_in_order(
    server: Served, direct: dict[str, RolloutResult]
) -> None:
    ids = list(direct["greedy"].prompt_token_ids)
    body = {"max_tokens": 12, "temperature": 0, "return_token_ids": True}
    told = server.completion([ids, [1, 2, 3], ids], n=2, **body)
    choices = told["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["prompt_token_ids"] for choice in choices] == [ids, ids, [1, 2, 3], [1, 2, 3], ids, ids]
    assert all(tuple(choices[i]["token_ids"]) == direct["greedy"].token_ids for i in (0, 1, 4, 5))


def test_a_stream_is_the_whole_answer_in_pieces(server: Served, client: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "policy",
        "prompt": PROMPT,
        "max_tokens": 40,
        "seed": SEED,
        "n": 3,
        "logprobs": TOP,
    }
    whole = client.completions.create(**body, stop=["bo", "idge"])
    texts, logprobs = ["", "", ""], [[], [], []]  # type: ignore[var-annotated]
    finish: dict[int, Any] = {}
    usage = None
    stream = client.completions.create(
        **body,
        stop=["bo", "idge"],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    assert texts == [choice.text for choice in whole.choices]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs]
    assert finish == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


@pytest.mark.parametrize(("interval_s", "fewest", "most"), [(0.0, 100, 201), (10.0, 1, 3)])
def test_a_stream_sends_each_token_by_itself_or_some_together(
    tokenizer: Any, interval_s: float, fewest: int, most: int
) -> None:
    """Where none waits for the next, some still share an event when the event loop is late."""
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 200, "ignore_eos": True, "stream": True})
    with served(loaded(), tokenizer, config=ServerConfig(stream_interval_s=interval_s), **KEYS) as found:
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{found.url}/v1/completions", content=body, headers=headers, timeout=100)
    assert fewest <= sum(line.startswith("data: {") for line in answer.text.split("\n")) <= most


def test_a_seed_repeats_a_request_and_none_draws_anew(server: Served) -> None:
    def text(**body: Any) -> list[str]:
        return [choice["text"] for choice in server.completion(PROMPT, max_tokens=12, **body)["choices"]]

    assert text(seed=SEED, n=2) == text(seed=SEED, n=2) != text(seed=SEED + 1, n=2)
    assert len(set(text(seed=SEED, n=4))) > 1
    assert text() != text()


def test_requests_that_are_the_same_at_the_same_time_share_their_tokens(server: Served) -> None:
    before = server.engine.load.stats.num_generated_tokens

    async def together() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as http:
            body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "seed": 123}
            told = await asyncio.gather(*(http.post(f"{server.url}/v1/completions", json=body) for _ in range(8)))
            return [answer.json()["choices"][0]["text"] for answer in told]

    assert len(set(asyncio.run(together()))) == 1
    assert server.engine.load.stats.num_generated_tokens - before < 8 * 400


def test_a_chat_is_the_engines_own_with_logprobs_in_their_shape(
    client: openai.OpenAI, direct: dict[str, RolloutResult]
) -> None:
    expected = direct["chat"]
    body: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    told = client.chat.completions.create(**body, max_completion_tokens=12, logprobs=True, top_logprobs=TOP)
    choice = told.choices[0]
    assert choice.message.content == expected.text and choice.finish_reason == expected.finish_reason
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(list(expected.logprobs), abs=1e-5)
    assert all(len(token.top_logprobs) == TOP for token in choice.logprobs.content)
    pieces = [
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(**body, max_tokens=12, stream=True)
    ]
    assert "".join(pieces) == expected.text
    assert sum(1 for _ in client.chat.completions.create(**body, max_tokens=400, stream=True)) > 3


def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(server: Served) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={"messages": chat, "stream": True}) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())  # the client leaves here
    server.wait_until_idle()


def test_async_clients_together_get_what_each_gets_alone(server: Served) -> None:
    async def ask(many: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            told = await asyncio.gather(
                *(client.completions.create(model="policy", prompt=p, max_tokens=16, seed=1) for p in many)
            )
        return [answer.choices[0].text for answer in told]

    prompts = [f"{PROMPT} {i}" for i in range(32)]
    assert asyncio.run(ask(prompts)) == [asyncio.run(ask([prompt]))[0] for prompt in prompts]


def test_tokenize_and_detokenize_are_the_tokenizers(server: Served, tokenizer: Any) -> None:
    told = server.post("/tokenize", prompt=PROMPT).json()
    assert told["tokens"] == tokenizer(PROMPT)["input_ids"] and told["count"] == len(told["tokens"])
    assert server.post("/detokenize", tokens=told["tokens"]).json() == {"prompt": PROMPT}
    chat = [{"role": "user", "content": PROMPT}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert server.post("/tokenize", messages=chat).json()["tokens"] == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_curl_needs_no_more_than_a_body_and_a_key(tokenizer: Any) -> None:
    def curl(*options: str) -> str:
        command = ["curl", "-sN", f"{found.url}/v1/completions", "-H", "Content-Type: application/json", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "stream": True, "return_token_ids": True})
    with served(loaded(), tokenizer, api_key="sesame", **KEYS) as found:
        lines = curl("-d", body, "-H", "Authorization: Bearer sesame").split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and num_streamed(lines) == 3
        assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"
        told, status = curl("-d", body, "-w", "\n%{http_code}").splitlines()
        assert status == "401" and json.loads(told)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("num_clients", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_that_vanish_leave_nothing_behind(server: Served, num_clients: int) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    before = server.engine.load.stats.num_generated_tokens
    for i in range(num_clients):
        body = json.dumps(
            {"prompt": f"{PROMPT} {i}", "max_tokens": 2000, "ignore_eos": True, "stream": bool(i % 2), "n": 2}
        )
        request = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{request}\r\n\r\n{body}".encode())
            if i % 4 == 1:
                connection.recv(200)
            if i % 4 == 2:
                time.sleep(0.01)
    server.wait_until_idle()
    assert server.engine.load.stats.num_generated_tokens - before < num_clients * 2 * 2000
    assert server.completion(PROMPT, max_tokens=1)["choices"]
    server.wait_until_idle()


def test_metrics_count_what_was_answered(server: Served) -> None:
    def scraped() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        return {
            s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples if not s.labels
        }

    before = scraped()
    server.completion([1, 2, 3, 4, 5], max_tokens=5, n=2, ignore_eos=True)
    after = scraped()

    def grown(name: str) -> float:
        return after[f"cpinfer_{name}"] - before[f"cpinfer_{name}"]

    assert grown("generation_tokens_total") == 10 and grown("prompt_tokens_total") == 5
    assert grown("time_to_first_token_seconds_count") == grown("time_per_output_token_seconds_count") == 2
    assert after["cpinfer_requests_running"] == after["cpinfer_weights_version"] == 0
    assert {"cpinfer_preemptions_total", "cpinfer_kv_cache_usage_ratio", "cpinfer_requests_waiting"} <= after.keys()


def test_new_weights_are_told_with_the_tokens_that_they_made(tokenizer: Any) -> None:
    def run(server: Any, end: Any) -> None:
        server.run_until(lambda: server._engine.load.stats.num_generated_tokens >= 5)
        server._engine.weights_changed()
        server.run_until(end.is_set)

    with served(loaded(), tokenizer, run=run, **KEYS) as found:
        told = found.completion(PROMPT, max_tokens=50, ignore_eos=True)
        (old, num_old), (new, num_new) = told["choices"][0]["weights_versions"]
        assert (old, new, num_old + num_new) == (0, 1, 50) and num_old >= 5 and told["weights_version"] == 1


def test_tools_are_rendered_and_their_calls_parsed() -> None:
    tokenizer = add_response_schema(tool_tokenizer())
    question = chats([" Alice"])[0]
    with served(tool_model(words=(), eagerness=2.0), tokenizer, **KEYS) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)
        body: dict[str, Any] = {
            "model": "policy",
            "messages": question,
            "tools": [FOLLOW],
            "temperature": 0,
            "max_tokens": 20,
        }
        choice = client.chat.completions.create(**body).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
        (call,) = choice.message.tool_calls
        asked = json.loads(call.function.arguments)
        assert call.function.name == "follow" and asked.keys() == {"name"}
        events = list(client.chat.completions.create(**body, stream=True))
        (told,) = [call for event in events for call in event.choices[0].delta.tool_calls or ()]
        assert told.function is not None and told.function.arguments == call.function.arguments
        assert events[-1].choices[0].finish_reason == "tool_calls"
        # The next turn has the call as the client has it, its arguments a text.
        answer = {"role": "tool", "tool_call_id": call.id, "content": follow(**asked)}
        rest = [*question, choice.message.model_dump(exclude_none=True), answer]
        rendered = found.post("/tokenize", messages=rest, tools=[FOLLOW]).json()["tokens"]
        objects = [
            *question,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "follow", "arguments": asked}}],
            },
            answer,
        ]
        assert rendered == tokenizer.apply_chat_template(
            objects, tools=[FOLLOW], add_generation_prompt=True, return_dict=False
        )
        plain = client.chat.completions.create(**{**body, "tool_choice": "none"}).choices[0]
        assert plain.finish_reason != "tool_calls" and plain.message.tool_calls is None
