"""What a caller may give an engine: one prompt in any form is a batch of one, the same in all forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import Prompt
from tiny_models import FAMILIES, make_model

IDS = [65, 66, 67]
GREEDY = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)


class Letters:
    """A token per letter; a chat is its contents."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [ord(letter) for message in messages for letter in message["content"]]

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(map(chr, token_ids))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = parse_config({"dtype": "float32", "kv_cache_gib": 0.01})
    with cpinfer.attach(make_model(FAMILIES["llama"]), config=config, tokenizer=Letters()) as engine:
        yield engine


FORMS = [
    "ABC",
    ["ABC"],
    IDS,
    [IDS],
    np.array(IDS),
    torch.tensor(IDS),
    torch.tensor([IDS]),
    [{"role": "user", "content": "ABC"}],
    [[{"role": "user", "content": "ABC"}]],
    {"prompt": "ABC"},
    {"prompt_token_ids": np.array(IDS)},
    {"messages": [{"role": "user", "content": "ABC"}]},
]


@pytest.mark.parametrize("given", [*FORMS, Prompt(0, "0", tuple(IDS))], ids=repr)
def test_one_prompt_in_any_form_is_a_batch_of_one(engine: Engine, given: Any) -> None:
    [result] = engine.generate(given, GREEDY)
    [expected] = engine.generate([IDS], GREEDY)
    assert result.prompt_token_ids == tuple(IDS) and result.token_ids == expected.token_ids


@pytest.mark.parametrize("given", FORMS, ids=repr)
def test_a_pooled_prompt_has_any_form(engine: Engine, given: Any) -> None:
    [result] = engine.generate_pooled(given, GREEDY)
    assert result.prompt_token_ids == tuple(IDS)


def test_a_pair_may_stand_alone(engine: Engine) -> None:
    pairs: list[Any] = [("ABC", [68]), (torch.tensor(IDS), np.array([68])), [("ABC", [68])]]
    assert len({tuple(result.logprobs) for pair in pairs for result in engine.score(pair)}) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda e: e.generate([1, "a"]), "prompt 0 is 1"),
        (lambda e: e.generate(None), "a prompt or a list of prompts was wanted"),
        (lambda e: e.generate([{"prompt": "A", "id": "a"}, {"prompt": "B", "id": "a"}]), 'have the same "id" ("a")'),
        (lambda e: e.generate("A", {"temperature": 0}), "for sampling"),
        (lambda e: e.generate(["A", "B"], []), "0 sampling parameters for 2 prompts"),
        (lambda e: e.generate("A", SamplingParams(logit_bias={128: 1})), '"logit_bias" has token id 128'),
        (lambda e: e.generate("A", SamplingParams(stop_token_ids=[128])), '"stop_token_ids" has token id 128'),
        (lambda e: e.generate_pooled([[1.5]]), "prompt 0 is"),
        (lambda e: e.generate_pooled([[2**70]]), "which no vocabulary holds"),
        (lambda e: e.generate_pooled("A", [GREEDY]), "for sampling; SamplingParams were wanted"),
        (lambda e: e.score([("A", "B")]), "the continuation of pair 0"),
        (lambda e: e.score("AB"), "pairs of a prompt and token ids were wanted"),
    ],
)
def test_what_is_none_is_refused_and_the_engine_goes_on(engine: Engine, call: Any, words: str) -> None:
    with pytest.raises(cpinfer.UserError) as caught:
        call(engine)
    assert words in str(caught.value)
    assert len(engine.generate("A", GREEDY)) == 1
