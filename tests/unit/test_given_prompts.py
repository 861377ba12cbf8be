"""What callers in Python give: one prompt or many in any form, pairs of a prompt and what continues it."""

from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cpinfer.engine.prompts import as_pairs, as_prompt, as_prompts, as_token_lists
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "configs" / "recall-tiny")


USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
PROMPT = Prompt(3, "mine", (1, 2))


@pytest.mark.parametrize(
    "given, prompts",
    [
        ("hello", ["hello"]),
        (["hello"], ["hello"]),
        (("a", "b"), ["a", "b"]),
        (iter(["a", "b"]), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ((1,), [(1,)]),
        (range(3), [(0, 1, 2)]),
        ([np.int64(1), np.int32(2)], [(1, 2)]),
        (np.array([1, 2]), [(1, 2)]),
        (torch.tensor([1, 2]), [(1, 2)]),
        (list(torch.tensor([1, 2])), [(1, 2)]),
        (np.array([[1, 2], [3, 4]]), [(1, 2), (3, 4)]),
        (torch.tensor([[1, 2], [3, 4]]), [(1, 2), (3, 4)]),
        ([np.array([1, 2]), torch.tensor([3])], [(1, 2), (3,)]),
        ([[1, 2], (3,), "c"], [(1, 2), (3,), "c"]),
        ([[1], []], [(1,), ()]),
        ([USER], [{"messages": [USER]}]),
        ((SYSTEM, USER), [{"messages": [SYSTEM, USER]}]),
        ([[USER], [SYSTEM, USER]], [{"messages": [USER]}, {"messages": [SYSTEM, USER]}]),
        ({"prompt": "a", "id": "x"}, [{"prompt": "a", "id": "x"}]),
        ([{"prompt": "a"}, {"messages": [USER]}], [{"prompt": "a"}, {"messages": [USER]}]),
        (PROMPT, [PROMPT]),
        ([PROMPT, "a"], [PROMPT, "a"]),
        ([], []),
        ((), []),
    ],
)
def test_what_can_be_one_prompt_only_is_one_and_a_list_is_many(given, prompts):
    found = as_prompts(given)
    assert found == prompts
    ids = [prompt for prompt in found if isinstance(prompt, tuple)]
    assert all(type(token) is int for tokens in ids for token in tokens), "what numpy and torch hold stays there"


@pytest.mark.parametrize(
    "given, words",
    [
        (None, "found null (a NoneType); a prompt or a list of prompts was wanted"),
        (5, "found 5 (a int)"),
        (b"hello", "(a bytes); a prompt or a list"),
        ({"hello"}, "(a set); a prompt or a list"),
        (np.int64(5), "found 5 (a int)"),
        (torch.tensor(5), "found 5 (a int)"),
        ([1, "a"], "prompt 0 is 1 (a int); a text, a list of token ids, a chat or an object was wanted"),
        (["a", 1], "prompt 1 is 1 (a int)"),
        ([True, False], "prompt 0 is true (a bool)"),
        ([1, True], "prompt 0 is 1 (a int)"),
        ([1.0, 2.0], "prompt 0 is 1.0 (a float)"),
        (np.array([1.0]), "prompt 0 is 1.0 (a float)"),
        (torch.tensor([[1.0]]), "prompt 0 is [1.0] (a list)"),
        (np.zeros((1, 1, 1), dtype=int), "prompt 0 is [[0]] (a list)"),
        ([["a", "b"]], 'prompt 0 is ["a", "b"] (a list)'),
        ([[1, 2.5]], "prompt 0 is [1, 2.5] (a list)"),
        ([[1, None]], "prompt 0 is [1, null] (a list)"),
        ([None], "prompt 0 is null (a NoneType)"),
        ([b"a"], "prompt 0 is"),
        ([[USER, "a"]], "prompt 0 is"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_in_one_sentence(given, words):
    with pytest.raises(UserError) as caught:
        as_prompts(given)
    assert words in str(caught.value) and len(str(caught.value)) < 200


def test_a_message_among_prompts_is_an_object_without_a_prompt():
    [_, message] = as_prompts(["a", USER])
    with pytest.raises(UserError, match="exactly one of prompt, prompt_token_ids, messages was wanted"):
        as_prompt(message, 1, None)


def test_an_object_says_nothing_that_is_not_heard():
    with pytest.raises(UserError, match='"temperature" says how tokens are chosen: put it under "sampling"'):
        as_prompt({"prompt_token_ids": [1], "temperature": 0}, 0, None)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_an_object_of_any_kind_is_one_prompt(tokenizer, kind):
    ids = tuple(tokenizer("a b")["input_ids"])
    for given in (kind(prompt="a b"), [kind(prompt="a b")], kind(messages=[kind(role="user", content="a b")])):
        assert [as_prompt(prompt, 0, tokenizer).token_ids for prompt in as_prompts(given)] == [ids]


@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt"}], ids=str)
def test_what_a_tokenizer_gives_is_named_and_its_ids_are_taken(tokenizer, options):
    given = tokenizer(["a b"], **options)
    with pytest.raises(UserError, match=r'Of what a tokenizer gives, hand over its "input_ids", without padding\.'):
        [as_prompt(prompt, 0, tokenizer) for prompt in as_prompts(given)]
    [ids] = as_prompts(given["input_ids"])
    assert as_prompt(ids, 0, None) == as_prompt("a b", 0, tokenizer)


def test_pooled_prompts_are_token_ids_from_any_form(tokenizer):
    ids = tuple(tokenizer("hi")["input_ids"])
    assert as_token_lists(["hi", list(ids), [USER]], tokenizer) == [ids, ids, ids]
    assert as_token_lists("hi", tokenizer) == as_token_lists(np.array(ids), None) == [ids]
    assert as_token_lists([], None) == []


@pytest.mark.parametrize(
    "given, words",
    [
        (["text"], "needs a tokenizer"),
        ([[]], "the prompt is empty"),
        ([PROMPT], "prompt 0 has an id"),
        ([[1], {"prompt_token_ids": [1], "id": "x"}], "prompt 1 has an id"),
        ([{"prompt_token_ids": [1], "sampling": {"n": 2}}], 'prompt 0: "sampling" of a prompt\'s own'),
        ([[2**63]], "prompt 0 is [9223372036854775808], which no vocabulary holds"),
        ([[1.5]], "prompt 0 is [1.5]"),
    ],
)
def test_what_cannot_be_pooled_is_named(given, words):
    with pytest.raises(UserError) as caught:
        as_token_lists(given, None)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "given, pairs",
    [
        ([("a", [1])], [("a", (1,))]),
        (("a", [1]), [("a", (1,))]),
        (["a", np.array([1])], [("a", (1,))]),
        ([("a", [1]), ("b", [2])], [("a", (1,)), ("b", (2,))]),
        ([([1], [2]), ([3], [4])], [((1,), (2,)), ((3,), (4,))]),
        (([1, 2], [3, 4]), [((1, 2), (3, 4))]),
        ((torch.tensor([1, 2]), torch.tensor([3])), [((1, 2), (3,))]),
        (([USER], [1]), [({"messages": [USER]}, (1,))]),
        (zip(["a"], [[1]], strict=True), [("a", (1,))]),
        ([("a", [])], [("a", ())]),
        ([([], [1])], [((), (1,))]),
        ([], []),
    ],
)
def test_a_pair_is_a_prompt_and_token_ids_and_one_may_stand_alone(given, pairs):
    assert as_pairs(given) == pairs


@pytest.mark.parametrize(
    "given, words",
    [
        ("ab", 'found "ab" (a str); pairs of a prompt and token ids were wanted'),
        (None, "found null (a NoneType)"),
        (("a", "b"), 'the continuation of pair 0 is "b" (a str); a list of token ids was wanted'),
        ([("a", "b"), ("c", "d")], "the continuation of pair 0"),
        ([("a", [1]), ("b", [1.5])], "the continuation of pair 1 is [1.5] (a list)"),
        (["a", "b", "c"], 'pair 0 is "a" (a str); a prompt and the token ids'),
        ([("a", [1], [2])], "pair 0 is"),
        ([(1, [1])], "pair 0 is [1, [1]] (a tuple)"),
        ([("a", [True])], "the continuation of pair 0 is [true]"),
    ],
    ids=str,
)
def test_what_is_no_pair_is_refused_in_one_sentence(given, words):
    with pytest.raises(UserError) as caught:
        as_pairs(given)
    assert words in str(caught.value) and len(str(caught.value)) < 200
