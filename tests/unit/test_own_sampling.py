"""Sampling that a prompt brings itself: the same from JSON and Python, held to the schema, over that of the call."""

import json

import numpy as np
import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.prompts import as_prompt, read_input, sampling_of
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError


def test_a_line_says_how_it_is_sampled_and_wins(tmp_path):
    base = SamplingParams(temperature=0, n=2, max_new_tokens=300, stop=["x"], seed=5)
    own = {"n": 3, "stop": ".", "logit_bias": {"5": -1}, "seed": 6, "min_new_tokens": 200}
    path = tmp_path / "in.jsonl"
    said = ({"sampling": own}, {}, {"sampling": {}}, {"sampling": None})
    path.write_text("\n".join(json.dumps({"prompt_token_ids": [1], **more}) for more in said), encoding="utf-8")
    inputs, complaints = read_input(str(path), None, own_sampling=True)
    assert complaints == []
    assert [line.prompt.sampling is None for line in inputs] == [False, True, True, True]
    expected = SamplingParams(
        temperature=0, n=3, max_new_tokens=300, stop=(".",), seed=6, logit_bias=((5, -1.0),), min_new_tokens=200
    )
    assert sampling_of(inputs[0].prompt, base) == expected
    assert sampling_of(inputs[1].prompt, base) is base
    hash(inputs[0].prompt)


def test_what_a_prompt_says_of_its_sampling_is_the_same_from_json_and_python():
    own = {"stop": ["x"], "n": 2}
    from_object = as_prompt({"prompt_token_ids": [1], "sampling": own}, 0, None)
    assert from_object.sampling == (("n", 2), ("stop", ("x",)))
    assert as_prompt(Prompt(0, "0", (1,), own), 0, None) == from_object
    assert as_prompt(Prompt(0, "0", (1,), {"n": np.int64(2), "stop": "x"}), 0, None) == from_object
    assert as_prompt(from_object, 0, None) is from_object


@pytest.mark.parametrize(
    "own, words",
    [
        ([], '"sampling" is []; an object with keys of SamplingParams was wanted'),
        ("greedy", '"sampling" is "greedy"'),
        ((1, 2), '"sampling" is [1, 2]'),
        (SamplingParams(), '"sampling" is'),
        ({"max_tokens": 3}, 'unknown key "sampling.max_tokens"; the nearest known key is "sampling.'),
        ({"max_new_tokens": 0}, '"sampling.max_new_tokens" is 0; it must be at least 1'),
        ({"max_new_tokens": "3"}, '"sampling.max_new_tokens" is "3"; a whole number was wanted'),
        ({"seed": None}, '"sampling.seed" is null; a whole number was wanted'),
        ({"stop": [1]}, '"sampling.stop[0]" is 1; a text was wanted'),
        ({"logit_bias": {"a": 1}}, '"sampling.logit_bias[0]" is "a"; a whole number was wanted'),
    ],
    ids=str,
)
def test_sampling_that_no_schema_allows_is_named(own, words):
    for given in ({"prompt_token_ids": [1], "sampling": own}, Prompt(0, "0", (1,), own)):
        with pytest.raises(UserError) as caught:
            as_prompt(given, 0, None)
        assert words in str(caught.value) and len(str(caught.value)) < 300


def test_sampling_that_does_not_go_together_with_the_rest_is_named_when_the_rest_is_known():
    prompt = as_prompt({"prompt_token_ids": [1], "sampling": {"min_new_tokens": 200}}, 0, None)
    assert sampling_of(prompt, SamplingParams(max_new_tokens=200)).min_new_tokens == 200
    with pytest.raises(UserError, match='"sampling": "min_new_tokens" is 200; it must be at most "max_new_tokens"'):
        sampling_of(prompt, SamplingParams(max_new_tokens=100))
