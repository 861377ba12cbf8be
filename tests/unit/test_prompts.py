"""Prompts: every form a user may write, and for every mistake a sentence with the line and the numbers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpinfer.config import SamplingParams
from cpinfer.engine.prompts import (
    as_prompt,
    as_sampling,
    check_distinct,
    check_prompt,
    check_sampling,
    longest_prompt,
    read_input,
)
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.layout.shards import KVSharding
from cpinfer.models.spec import ModelSpec

FOLDER = Path(__file__).parents[2] / "configs" / "recall-tiny"
SPEC = ModelSpec.from_config(json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))


def load_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def read(tmp_path, tokenizer):
    """Reads a file of the given lines: (inputs, complaints)."""

    def read(*lines, tokenizer=tokenizer, end="\n", **options):
        path = tmp_path / "in.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + end for x in lines), encoding="utf-8")
        return read_input(str(path), tokenizer, **options)

    return read


def test_text_ids_and_chat_become_token_ids(tokenizer, read):
    chat = [{"role": "user", "content": "hi there"}]
    inputs, complaints = read({"prompt": "hi there"}, {"prompt_token_ids": [3, 4]}, {"messages": chat})
    assert complaints == []
    text_ids = tuple(tokenizer("hi there")["input_ids"])
    assert [line.prompt.token_ids for line in inputs] == [text_ids, (3, 4), text_ids]


def test_the_library_takes_the_same_forms_and_plain_values(tokenizer):
    ids = tuple(tokenizer("hi")["input_ids"])
    assert as_prompt("hi", 0, tokenizer).token_ids == ids
    assert as_prompt(list(ids), 0, None) == as_prompt({"prompt_token_ids": ids}, 0, None) == Prompt(0, "0", ids)
    prompt = Prompt(5, "mine", (1,))
    assert as_prompt(prompt, 0, None) is prompt


def test_a_prompt_made_in_python_is_checked_as_its_json_is():
    assert as_prompt(Prompt(5, "mine", [1, 2]), 0, None) == Prompt(5, "mine", (1, 2))
    with pytest.raises(UserError, match="the prompt is empty"):
        as_prompt(Prompt(5, "mine", ()), 0, None)
    with pytest.raises(UserError, match="must be a list of whole numbers"):
        as_prompt(Prompt(5, "mine", (1.5,)), 0, None)


def test_ids_default_to_the_index_and_may_be_text_or_number(read):
    inputs, complaints = read(
        {"prompt_token_ids": [1]}, {"prompt_token_ids": [1], "id": "x"}, {"prompt_token_ids": [1], "id": 77}
    )
    assert [line.prompt.id for line in inputs] == ["0", "x", "77"] and complaints == []


@pytest.mark.parametrize("bad", [None, 1.5, [], {}])
def test_an_id_that_is_neither_text_nor_number_is_named(bad):
    with pytest.raises(UserError, match=r'"id" is .*; a text or a whole number was wanted'):
        as_prompt({"prompt_token_ids": [1], "id": bad}, 0, None)


def test_an_id_given_twice_names_both_lines(read):
    one = {"prompt_token_ids": [1], "id": "x"}
    inputs, complaints = read(one, "", {"prompt_token_ids": [2]}, one)
    assert [line.prompt.index for line in inputs] == [0, 1]
    assert len(complaints) == 1
    assert "line 4: " in complaints[0] and '"id" is the same as in line 1 ("x")' in complaints[0]


@pytest.mark.parametrize("first, second", [({"id": 7}, {"id": "7"}), ({}, {"id": "0"}), ({}, {"id": 0})])
def test_ids_that_read_alike_are_the_same_and_say_where_they_come_from(read, first, second):
    _, complaints = read({"prompt_token_ids": [1], **first}, {"prompt_token_ids": [2], **second})
    assert len(complaints) == 1
    assert 'the same as in line 1 ("' in complaints[0] and "named by its place, from 0" in complaints[0]


def test_a_mark_before_the_text_is_none_of_it(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt_token_ids": [1]}\n')
    assert read_input(str(path), None)[1] == []


@pytest.mark.parametrize("path", ["in\0.jsonl", "x" * 300])
def test_a_path_that_is_none_is_named(path):
    with pytest.raises(UserError, match=r"^input "):
        read_input(path, None)


def test_an_answer_is_kept_and_null_is_none(read):
    inputs, complaints = read({"prompt_token_ids": [1], "answer": "yes"}, {"prompt_token_ids": [1], "answer": None})
    assert [line.answer for line in inputs] == ["yes", None] and complaints == []


def test_a_line_may_say_more_to_whoever_keeps_it(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt_token_ids": [1], "answer": 3, "solution": [4]}\n', encoding="utf-8")
    inputs, complaints = read_input(str(path), None, keep_other_keys=True)
    assert [line.prompt.token_ids for line in inputs] == [(1,)] and complaints == []
    path.write_text('{"prompt_token_ids": [1.0], "solution": [4]}\n', encoding="utf-8")
    assert len(read_input(str(path), None, keep_other_keys=True)[1]) == 1


def test_blank_lines_count_as_lines_and_not_as_prompts(read):
    inputs, complaints = read("", {"prompt_token_ids": [1]}, "   ", "", {"prompt_token_ids": [2]}, "")
    assert [(line.number, line.prompt.index) for line in inputs] == [(2, 0), (5, 1)] and complaints == []


def test_a_bad_line_keeps_its_place_in_the_count(read):
    inputs, complaints = read({"prompt_token_ids": [1]}, "{", {"prompt_token_ids": [2]})
    assert [(line.number, line.prompt.index, line.prompt.id) for line in inputs] == [(1, 0, "0"), (3, 2, "2")]
    assert len(complaints) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_as_on_any_system(read, end):
    inputs, complaints = read({"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}, end=end)
    assert len(inputs) == 2 and complaints == []


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85"])
def test_only_line_ends_end_a_line(tokenizer, read, char):
    """JSON lets these stand in a text as they are; `json.dumps(ensure_ascii=False)` writes them so."""
    line = json.dumps({"prompt": f"a{char}b"}, ensure_ascii=False)
    inputs, complaints = read(line, {"prompt": "c"})
    assert complaints == []
    assert [x.number for x in inputs] == [1, 2]
    assert inputs[0].prompt.token_ids == tuple(tokenizer(f"a{char}b")["input_ids"])


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("prompt", "not valid JSON"),
        ("[1, 2]", "found [1, 2]; an object was wanted"),
        ('"text"', 'found "text"; an object was wanted'),
        ("null", "found null; an object was wanted"),
        ({}, "found the keys []; exactly one of prompt, prompt_token_ids, messages was wanted"),
        ({"text": "a"}, 'found the keys ["text"]'),
        ({"prompt": "a", "prompt_token_ids": [1]}, 'found the keys ["prompt", "prompt_token_ids"]; exactly one of'),
        ({"prompt": ""}, "the prompt is empty; at least one token was wanted"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt": 5}, '"prompt" is 5; a text was wanted'),
        ({"prompt": None}, '"prompt" is null; a text was wanted'),
        ({"prompt": ["a", "b"]}, '"prompt" is ["a", "b"]; a text was wanted'),
        ({"prompt_token_ids": "12"}, "must be a list of whole numbers"),
        ({"prompt_token_ids": 12}, "must be a list of whole numbers"),
        ({"prompt_token_ids": [1, 2.0]}, "must be a list of whole numbers"),
        ({"prompt_token_ids": [1, True]}, "must be a list of whole numbers"),
        ({"prompt_token_ids": [[1, 2]]}, "must be a list of whole numbers"),
        ({"messages": []}, '"messages" must be a list of objects'),
        ({"messages": "hi"}, '"messages" must be a list of objects'),
        ({"messages": {"role": "user"}}, '"messages" must be a list of objects'),
        ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": 5}]}, '"messages[0].content" is 5; a text or a list of text parts'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "cpinfer does not support multimodal models",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, '"tools" are given, which the model\'s chat'),
        (
            {"prompt": "a", "tools": [{}]},
            '"tools" is for the chat template, which only "messages" pass; here is "prompt"',
        ),
        (
            {"prompt_token_ids": [1], "chat_template_kwargs": {"a": 1}},
            '"chat_template_kwargs" is for the chat template',
        ),
        ({"prompt": "a", "max_new_tokens": 3}, '"max_new_tokens" says how tokens are chosen: put it under "sampling"'),
        ({"prompt": "a", "stop": ["x"]}, '"stop" says how tokens are chosen: put it under "sampling"'),
        ({"prompt": "a", "sampling": {"n": 2}}, '"sampling" of a prompt\'s own is for generate, stream and rollout'),
        ({"input_ids": [1], "attention_mask": [1]}, 'hand over its "input_ids", without padding'),
        (r'{"prompt": "half of a pair: \ud83d"}', "prompt"),
        (r'{"prompt_token_ids": [1], "id": "\ud83d"}', '"id" is "\\ud83d"; a text or a whole number was wanted'),
        (r'{"prompt_token_ids": [1], "answer": "\ud83d"}', '"answer" is "\\ud83d"; a text was wanted'),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', '"messages"'),
        ({"prompt_token_ids": [1], "answer": 3}, '"answer" is 3; a text was wanted'),
        ({"prompt_token_ids": [1], "answer": ["a"]}, '"answer" is ["a"]; a text was wanted'),
        ({"prompt_token_ids": [1], "id": True}, '"id" is true; a text or a whole number was wanted'),
        ({"prompt_token_ids": [1], "id": 1.0}, '"id" is 1.0; a text or a whole number was wanted'),
        ({"prompt_token_ids": [1], "id": 10**30}, "a text or a whole number was wanted"),
        ({"prompt_token_ids": [1], "temperture": 0}, 'unknown key "temperture"; the known ones are prompt, '),
        ({"prompt_token_ids": [1], "anwser": "a"}, 'unknown key "anwser"; the nearest known key is "answer"'),
        ('{"prompt_token_ids": [1], "prompt_token_ids": [2]}', 'the key "prompt_token_ids" stands twice'),
        ('{"prompt_token_ids": [NaN]}', '"prompt_token_ids[0]" is NaN; a finite number was wanted'),
        ('{"prompt_token_ids": [1e400]}', '"prompt_token_ids[0]" is 1e400; a finite number was wanted'),
        ('{"prompt_token_ids": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
        ({"prompt_token_ids": [1], "id": list(range(10**4))}, '"id" is [0, 1, 2'),
        ({"prompt_token_ids": ["a" * 10**5]}, "must be a list of whole numbers"),
        ({"prompt": ["a" * 10**5]}, "a text was wanted"),
        ({"x" * 10**5: 1}, "found the keys"),
        ({"prompt_token_ids": [1], "x" * 10**5: 1}, "unknown key"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_with_its_number(read, line, words):
    inputs, complaints = read({"prompt_token_ids": [1]}, line, {"prompt_token_ids": [2]})
    assert [x.number for x in inputs] == [1, 3]
    assert len(complaints) == 1
    assert "in.jsonl, line 2: " in complaints[0] and words in complaints[0]
    assert len(complaints[0].partition("line 2: ")[2]) < 400, "whatever the line holds"


@pytest.mark.parametrize("text", ["", "\n", "  \n\n\t\n"])
def test_an_empty_file_is_an_error(tmp_path, text):
    path = tmp_path / "in.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"input {path}: the file is empty; one JSON object per line was wanted"):
        read_input(str(path), None)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"input {path}: "):
            read_input(str(path), None)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=f"input {binary}: .*utf-8"):
        read_input(str(binary), None)


@pytest.mark.parametrize("form", [{"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}])
def test_text_without_a_tokenizer_says_what_to_use(form):
    with pytest.raises(UserError, match=r'needs a tokenizer, the model folder has none\. Use "prompt_token_ids"'):
        as_prompt(form, 0, None)


def test_messages_without_a_chat_template_are_refused():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match='"messages" do not fit the chat template'):
        as_prompt({"messages": [{"role": "user", "content": "hi"}]}, 0, tokenizer)


def test_messages_that_a_template_rejects_are_refused_in_its_words():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        as_prompt({"messages": [{"role": "user", "content": "hi"}]}, 0, tokenizer)


@pytest.mark.parametrize("key, value", [("sampling", {"n": 2}), ("tools", [{}]), ("chat_template_kwargs", {"a": 1})])
def test_a_line_for_a_trainer_says_nothing_that_the_trainer_does_not_hear(read, key, value):
    chat = {"messages": [{"role": "user", "content": "hi"}], "solution": 3}
    inputs, complaints = read(chat, {**chat, key: value}, keep_other_keys=True)
    assert len(inputs) == len(complaints) == 1 and f'line 2: "{key}"' in complaints[0]


def check(length, *, max_new_tokens=4, blocks=10**6, shards=1, token=5):
    """Check a prompt of `length` tokens against a pool of 16-token blocks."""
    prompt = Prompt(0, "p", (token,) * length)
    pool = PoolSize(blocks, KVSharding(shards, 16, 16))
    check_prompt(prompt, SamplingParams(max_new_tokens=max_new_tokens), SPEC, pool)


@pytest.mark.parametrize("token", [-1, 768, 10**30])
def test_a_token_outside_of_the_vocabulary_is_named(token):
    with pytest.raises(UserError, match=f"token id {token} is outside the vocabulary of 768 tokens"):
        check(3, token=token)


def test_the_ends_of_the_vocabulary_are_inside():
    check(3, token=0)
    check(3, token=767)


def test_a_prompt_needs_one_position_for_an_answer():
    check(32767)
    for length in (32768, 40000):
        with pytest.raises(UserError, match=f"has {length} tokens; the model has 32768 positions"):
            check(length)


def test_a_prompt_that_outgrows_the_pool_is_refused_with_numbers_and_advice():
    check(61, max_new_tokens=4, blocks=4)  # 64 tokens are cached: the last new one never is
    with pytest.raises(UserError) as caught:
        check(61, max_new_tokens=5, blocks=4)
    for words in ("has 61 tokens and may grow to 65", "the KV pool holds 64", "Raise kv_cache_gib", "max_new_tokens"):
        assert words in str(caught.value)


def test_shards_make_the_pool_hold_more():
    check(121, max_new_tokens=5, blocks=4, shards=2)
    with pytest.raises(UserError, match="may grow to 129; the KV pool holds 128"):
        check(125, max_new_tokens=5, blocks=4, shards=2)


def test_an_answer_never_grows_beyond_the_positions():
    """What cannot be generated need not fit into the pool."""
    check(32760, max_new_tokens=10**6, blocks=32768 // 16)


def test_an_id_may_come_twice_in_a_call_only_under_another_seed():
    """The number a place would be given by itself counts as well: a text "1" is the same id."""
    a, b, one = (Prompt(index, name, (5,)) for index, name in enumerate(("a", "b", "1")))
    check_distinct([], [])
    check_distinct([a, b, one], [0, 0, 0])
    check_distinct([a, a, b], [0, 1, 0])
    with pytest.raises(UserError, match=r'prompts 1 and 3 have the same "id" \("b"\) and seed; ids must differ'):
        check_distinct([a, b, a, b], [0, 7, 1, 7])
    given = ["text", {"prompt": "text", "id": "x"}, {"prompt": "text", "id": "0"}]
    tokenizer = load_tokenizer()
    with pytest.raises(UserError, match="prompts 0 and 2 have the same"):
        check_distinct([as_prompt(prompt, i, tokenizer) for i, prompt in enumerate(given)], [0, 0, 0])


def test_sampling_is_one_for_all_or_one_each():
    own, default = SamplingParams(n=2), SamplingParams()
    assert as_sampling(None, 2) == [default, default]
    assert as_sampling(own, 2) == [own, own]
    assert as_sampling((own, default), 2) == [own, default]
    assert as_sampling([], 0) == []
    for bad, words in [
        ([], "0 sampling parameters for 2 prompts"),
        ({"n": 2}, "(a dict) for sampling; SamplingParams, or one for each prompt"),
        ([own, None], "(a list) for sampling"),
        ("greedy", '"greedy" (a str) for sampling'),
    ]:
        with pytest.raises(UserError) as caught:
            as_sampling(bad, 2)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "bad, good",
    [
        ({"stop_token_ids": [767, 768]}, {"stop_token_ids": [767]}),
        ({"logit_bias": {768: 1}}, {"logit_bias": {767: 1}}),
        ({"stop_token_ids": range(768), "min_new_tokens": 1}, {"stop_token_ids": range(768), "min_new_tokens": 0}),
    ],
)
def test_sampling_names_only_tokens_that_the_model_has(bad, good):
    check_sampling(SamplingParams(**{k: list(v) if isinstance(v, range) else v for k, v in good.items()}), SPEC)
    with pytest.raises(UserError, match=f'"{next(iter(bad))}"'):
        check_sampling(SamplingParams(**{k: list(v) if isinstance(v, range) else v for k, v in bad.items()}), SPEC)


def test_a_minimum_needs_a_token_that_ends_nothing():
    """The model's own tokens that end an answer count too, where they do end it."""
    others = sorted({*range(SPEC.vocab_size)} - {*SPEC.eos_token_ids})
    assert len(others) < SPEC.vocab_size
    for params in ({"ignore_eos": True, "min_new_tokens": 1}, {"min_new_tokens": 0}):
        check_sampling(SamplingParams(stop_token_ids=others, **params), SPEC)
    with pytest.raises(UserError, match="are all tokens there are"):
        check_sampling(SamplingParams(stop_token_ids=others, min_new_tokens=1), SPEC)


@pytest.mark.parametrize("sharding", [(1, 16, 16), (2, 3, 4), (2, 48, 16), (4, 1, 8)], ids=str)
@pytest.mark.parametrize("num_blocks", [1, 3, 10**6])
@pytest.mark.parametrize("max_new_tokens", [1, 7])
def test_the_longest_prompt_leaves_room_for_a_whole_answer_and_one_token_more_does_not(
    sharding, num_blocks, max_new_tokens
):
    pool, params = PoolSize(num_blocks, KVSharding(*sharding)), SamplingParams(max_new_tokens=max_new_tokens)
    longest = longest_prompt(params, SPEC, pool)

    def fits(length):
        try:
            check_prompt(Prompt(0, "p", (1,) * length), params, SPEC, pool)
        except UserError:
            return False
        return length + max_new_tokens <= SPEC.max_positions

    assert longest < 1 or fits(longest)
    assert not fits(max(longest, 0) + 1)


def test_an_answer_as_long_as_the_models_positions_leaves_no_room_for_a_prompt():
    params = SamplingParams(max_new_tokens=SPEC.max_positions)
    assert longest_prompt(params, SPEC, PoolSize(10**6, KVSharding(1, 16, 16))) == 0
