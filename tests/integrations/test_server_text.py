"""Texts that grow by tokens: their pieces are the whole text, and nothing is told that a stop string may cut off."""

from __future__ import annotations

import random
from typing import Any

import pytest
from trl.chat_template_utils import add_response_schema

from cpinfer.config import SamplingParams
from cpinfer.engine.stop_checker import shown_text, stop_begins_at
from cpinfer_integrations.server_text import ServerTokenizer
from small_tokenizers import KINDS, VOCAB_SIZE, tokenizer_of
from tool_models import tool_tokenizer

THOUGHT, TEXT = "<think>\nhm, é\n</think>\n\n", "Ok, wait."
CALLS = [f'<tool_call>\n{{"name": "follow", "arguments": {{"name": "{name}"}}}}\n</tool_call>' for name in "xy"]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([TEXT], {"content": TEXT}),
        ([THOUGHT, TEXT, *CALLS], {"reasoning_content": "hm, é", "content": TEXT, "tool_calls": 2}),
        (CALLS[:1], {"tool_calls": 1}),
        ([TEXT, CALLS[0], "So: ", CALLS[1][:-20]], {"content": f"{TEXT}So: {CALLS[1][:-20]}", "tool_calls": 1}),
        (['<tool_call>{"name": oops</tool_call>', TEXT], {"content": f'<tool_call>{{"name": oops</tool_call>{TEXT}'}),
    ],
    ids=("text", "all", "call", "cut", "broken"),
)
def test_a_message_that_grows_has_its_text_at_once_and_its_calls_whole(parts: list[str], told: dict[str, Any]) -> None:
    tokenizer = add_response_schema(tool_tokenizer())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    stream = ServerTokenizer(tokenizer).message_stream(prompt, [{"type": "function", "function": {"name": "follow"}}])
    assert stream is not None
    ids = [*tokenizer.encode("".join(parts), add_special_tokens=False), tokenizer.eos_token_id]
    deltas = [stream.feed([token], is_last=i == len(ids) - 1) for i, token in enumerate(ids)]
    found: dict[str, Any] = {}
    for name in ("content", "reasoning_content"):
        if text := "".join(delta.get(name, "") for delta in deltas).strip():
            found[name] = text
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if calls:
        found["tool_calls"] = len(calls)
        assert [call["index"] for call in calls] == list(range(len(calls))) and stream.num_calls == len(calls)
        assert all(call["function"]["arguments"] in ('{"name": "x"}', '{"name": "y"}') for call in calls)
    assert found == told
    if parts == [TEXT]:
        assert sum("content" in delta for delta in deltas) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_stream_are_the_whole_text(kind: str) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(kind)
    server_tokenizer = ServerTokenizer(tokenizer)
    num_stopped = num_early = 0
    for _ in range(300):
        stop = tuple({"".join(draw.choices("abc日 <>", k=draw.randrange(1, 4))) for _ in range(draw.randrange(3))})
        params = SamplingParams(stop=stop)
        stream = server_tokenizer.stream(stop)
        ids: list[int] = []
        told = ""
        for _ in range(draw.randrange(1, 40)):
            ids.append(draw.randrange(VOCAB_SIZE))
            if stop_begins_at(tokenizer, ids, params) is not None:
                num_stopped += 1
                break
            told += stream.feed(ids[-1:])
        num_early += bool(told)
        whole = shown_text(tokenizer, ids, params)
        assert whole.startswith(told)
        assert told + stream.end(whole) == whole
    assert num_stopped > 50 and num_early > 100
