"""What a caller may give an engine: one prompt in any form is a batch of one, the same in all forms."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_parity import generate, grid_name
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import Prompt
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model

IDS = [65, 66, 67]
GREEDY = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)
GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2)]


class Letters:
    """A token per letter; a chat is its contents."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [ord(letter) for message in messages for letter in message["content"]]

    def __len__(self) -> int:
        return 128

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
    UserDict(prompt="ABC"),
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
        (lambda e: e.generate({"prompt": "A", "max_new_tokens": 3}), 'put it under "sampling"'),
        (lambda e: e.generate({"prompt": "A", "sampling": {"n": 0}}), '"sampling.n" is 0; it must be at least 1'),
        (lambda e: e.generate({"input_ids": IDS, "attention_mask": [1, 1, 1]}), 'hand over its "input_ids"'),
        (lambda e: e.generate_pooled({"prompt": "A", "sampling": {"n": 2}}), '"sampling" of a prompt\'s own'),
        (lambda e: e.score(({"prompt": "A", "sampling": {"n": 2}}, [1])), '"sampling" of a prompt\'s own'),
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


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_prompt_is_sampled_as_it_says_itself_as_if_the_call_had_said_it(grid: RankGrid) -> None:
    model = make_model(FAMILIES["llama"])
    call = SamplingParams(n=2, max_new_tokens=5, seed=3)
    own: dict[str, Any] = {"n": 3, "temperature": 0.5, "seed": 4, "max_new_tokens": 7, "logit_bias": {"5": 2.5}}
    prompts = [IDS, [70, 71], IDS]
    given = [{"prompt_token_ids": IDS, "sampling": own}, [70, 71], {"prompt_token_ids": IDS, "sampling": {"top_k": 1}}]
    found = generate(model, grid, given, call)
    expected = generate(model, grid, prompts, [replace(call, **own), call, replace(call, top_k=1)])  # type: ignore
    assert len(found) == 7
    assert [(r.prompt_index, r.sample_index, r.token_ids, r.logprobs) for r in found] == [
        (r.prompt_index, r.sample_index, r.token_ids, r.logprobs) for r in expected
    ]
    said = {r.prompt_index: None if r.sampling is None else dict(r.sampling) for r in found}
    assert said == {0: {**own, "logit_bias": ((5, 2.5),)}, 1: None, 2: {"top_k": 1}}
    assert {r.sampling for r in expected} == {None}


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_chat_of_parts_tools_and_variables_is_answered_as_transformers_answers_it(grid: RankGrid) -> None:
    model = AutoModelForCausalLM.from_pretrained("configs/recall-tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("configs/recall-tiny")
    tokenizer.chat_template = (
        "{{ 'Tools: ' ~ tools[0].name ~ '. ' if tools }}{% for m in messages %}{{ m.content }}{{ '. ' }}{% endfor %}"
        "{{ 'Think!' if add_generation_prompt and thinking }}"
    )
    chat = [{"role": "user", "content": "The door waited"}, {"role": "assistant", "content": "It"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "The door waited"}]}]
    tools = [{"name": "key"}]
    given = [
        {"messages": parts, "tools": tools, "chat_template_kwargs": {"thinking": True}},
        [*parts, chat[1]],
    ]
    expected = [
        tokenizer.apply_chat_template(
            chat[:1], tools=tools, thinking=True, add_generation_prompt=True, return_dict=False
        ),
        tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=False),
    ]
    for result, prompt in zip(generate(model, grid, given, GREEDY, tokenizer), expected, strict=True):
        assert list(result.prompt_token_ids) == prompt
        assert list(result.token_ids) == check_rollout.generate_greedy(model, prompt, 3)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_what_is_hardly_meant_is_said_by_one_rank_once(grid: RankGrid, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token = 65, 66, "B"  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, logger="cpinfer"):
        generate(make_model(FAMILIES["llama"]), grid, ["AAC", "AAD"], replace(GREEDY, ignore_eos=False), tokenizer)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "end-of-text token" in said[0] and "two begin-of-text tokens" in said[1]
