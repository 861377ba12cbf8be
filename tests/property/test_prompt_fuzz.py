"""Whatever a line or a caller says, it is a prompt or a sentence, and the lines beside it are read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wild
from cpinfer.engine.prompts import LINE_KEYS, as_pairs, as_prompt, as_prompts, as_token_lists, read_input
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError

LONGEST_MESSAGE = 400
QUICK = settings(max_examples=200, deadline=5000, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=5000)
GOOD = '{"prompt_token_ids": [1], "id": "the good one"}'


class Tokenizer:
    """A token per byte; a chat is its contents. As the real ones do, it fails on what it does not know."""

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, **_):
        return list("".join(message["content"] for message in messages).encode())


LINES = st.dictionaries(
    st.one_of(st.sampled_from(list(LINE_KEYS)), wild.KEYS),
    st.one_of(
        st.text(max_size=5),
        st.lists(st.integers(0, 9), max_size=4),
        st.lists(st.fixed_dictionaries({"role": wild.SCALARS, "content": wild.SCALARS}), max_size=2),
        wild.VALUES,
    ),
    max_size=3,
).map(lambda line: as_text(line)) | st.text(max_size=30)
GIVEN = st.one_of(
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
    inputs, complaints = read_input(str(path), Tokenizer(), keep_other_keys=keep_other_keys)
    assert [inputs[0].prompt.id, inputs[-1].prompt.id] == ["the good one", "the good end"]
    for line in inputs:
        assert line.prompt.token_ids and all(type(token) is int for token in line.prompt.token_ids)
        (line.prompt.id + (line.answer or "")).encode()
    for complaint in complaints:
        assert len(complaint) < LONGEST_MESSAGE + len(str(path))
        complaint.encode()
    filled = sum(1 for text in path.read_text(encoding="utf-8").split("\n") if text.strip())
    assert len(inputs) + len(complaints) == filled


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
