"""Whatever a line or a caller says, it is a prompt or a sentence, and the lines beside it are read."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wild
from cpinfer.config import SamplingParams
from cpinfer.engine.prompts import LINE_KEYS, as_pairs, as_prompt, as_prompts, as_token_lists, read_input, sampling_of
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError

LONGEST_MESSAGE = 400
QUICK = settings(max_examples=200, deadline=5000, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=5000)
GOOD = '{"prompt_token_ids": [1], "id": "the good one"}'


class Tokenizer:
    """A token per byte; a chat is its contents behind its tools. As the real ones do, it fails on what it knows not."""

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def get_chat_template(self, tools=None):
        return "tools a n"

    def apply_chat_template(self, messages, tools=None, tokenize=True, **_):
        names = [tool["name"] for tool in tools or ()]
        text = "".join(names + [message["content"] for message in messages])
        return list(text.encode()) if tokenize else text


PARTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]) | wild.SCALARS, "text": wild.SCALARS}),
        wild.SCALARS,
    ),
    max_size=2,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]) | wild.SCALARS},
    optional={"content": wild.SCALARS | PARTS | wild.VALUES, "tool_calls": wild.VALUES},
)
SAMPLING = st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]) | wild.KEYS,
    st.integers(0, 9) | st.text(max_size=3) | wild.VALUES,
    max_size=3,
)


OBJECTS = st.dictionaries(
    st.one_of(st.sampled_from(list(LINE_KEYS)), wild.KEYS),
    st.one_of(
        st.text(max_size=5),
        st.lists(st.integers(0, 9), max_size=4),
        st.lists(MESSAGES, max_size=2),
        wild.VALUES,
    ),
    max_size=3,
)
OBJECTS |= st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, min_size=1, max_size=2)},
    optional={
        "tools": st.lists(st.fixed_dictionaries({"name": wild.SCALARS}) | wild.VALUES, max_size=2) | wild.VALUES,
        "chat_template_kwargs": st.dictionaries(wild.KEYS, wild.VALUES, max_size=2) | wild.VALUES,
        "sampling": SAMPLING,
    },
)
OBJECTS |= st.fixed_dictionaries({"prompt_token_ids": st.just([1]), "sampling": SAMPLING})
LINES = OBJECTS.map(lambda line: as_text(line)) | st.text(max_size=30)
GIVEN = st.one_of(
    OBJECTS,
    st.lists(OBJECTS, max_size=2),
    st.builds(Prompt, st.just(0), st.just("0"), st.just((1,)), SAMPLING | wild.VALUES | st.tuples(wild.VALUES)),
    wild.VALUES,
    st.lists(wild.VALUES, max_size=3),
    st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3),
    st.lists(st.integers(0, 9), max_size=3).map(np.array),
    st.lists(wild.SCALARS, max_size=3).map(lambda x: np.array(x, dtype=object)),
    st.sets(st.integers(0, 9)),
    st.binary(max_size=3),
    st.builds(SimpleNamespace),
    st.tuples(wild.VALUES, wild.VALUES),
)


def as_text(line):
    try:
        return json.dumps(line)
    except (RecursionError, ValueError):
        return "{}"


def check_lines(folder, lines, keep_other_keys):
    path = folder / "in.jsonl"
    path.write_text("\n".join([GOOD, *lines, GOOD.replace("one", "end")]), encoding="utf-8", errors="surrogatepass")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        with pytest.raises(UserError):
            read_input(str(path), Tokenizer())
        return
    inputs, complaints = read_input(
        str(path), Tokenizer(), keep_other_keys=keep_other_keys, own_sampling=not keep_other_keys
    )
    assert [inputs[0].prompt.id, inputs[-1].prompt.id] == ["the good one", "the good end"]
    for line in inputs:
        assert line.prompt.token_ids and all(type(token) is int for token in line.prompt.token_ids)
        (line.prompt.id + (line.answer or "")).encode()
        check_sampling_of(line.prompt)
    for complaint in complaints:
        assert len(complaint) < LONGEST_MESSAGE + len(str(path))
        complaint.encode()
    filled = sum(1 for text in path.read_text(encoding="utf-8").split("\n") if text.strip())
    assert len(inputs) + len(complaints) == filled


def check_sampling_of(prompt):
    """What it says of its sampling can be hashed, written, and is parameters with the rest, or a sentence."""
    hash(prompt)
    json.dumps(prompt.sampling)
    try:
        params = sampling_of(prompt, SamplingParams())
    except UserError as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE
    else:
        assert isinstance(params, SamplingParams)


def check_given(given):
    for take in (as_prompts, as_pairs, lambda g: as_token_lists(g, Tokenizer())):
        try:
            found = take(given)
        except UserError as error:
            assert 0 < len(str(error)) < LONGEST_MESSAGE
            continue
        assert isinstance(found, list)
    try:
        prompts = [as_prompt(prompt, i, Tokenizer()) for i, prompt in enumerate(as_prompts(given))]
    except UserError as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE
        return
    assert all(isinstance(p, Prompt) and all(type(t) is int for t in p.token_ids) for p in prompts)
    for prompt in prompts:
        check_sampling_of(prompt)


@QUICK
@given(st.lists(LINES, max_size=4), st.booleans())
def test_a_line_is_a_prompt_or_a_sentence(tmp_path_factory, lines, keep_other_keys):
    check_lines(tmp_path_factory.getbasetemp(), lines, keep_other_keys)


@QUICK
@given(GIVEN)
def test_what_a_caller_gives_is_prompts_or_a_sentence(given):
    check_given(given)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(st.lists(LINES, max_size=4), st.booleans())
def test_each_of_many_lines_is_a_prompt_or_a_sentence(tmp_path_factory, lines, keep_other_keys):
    check_lines(tmp_path_factory.getbasetemp(), lines, keep_other_keys)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(GIVEN)
def test_much_that_a_caller_gives_is_prompts_or_a_sentence(given):
    check_given(given)
