"""The summary of a run: plain sums, medians over what is known, null for what is not."""

import json

import pytest

from cpinfer.engine.request import RolloutResult
from cpinfer_tools.results.metrics import SampleMetrics, format_summary, summarize


def make_result(text="Mary;", num_tokens=3, tpot_s=0.1):
    return RolloutResult(
        "p",
        0,
        0,
        (1, 2, 3, 4),
        (7,) * num_tokens,
        text,
        (0.0,) * num_tokens,
        (0.0,) * num_tokens,
        "stop",
        0.5,
        tpot_s,
        0,
    )


def sample(generated=3, ttft_s=1.0, tpot_s=0.1, retrieved=None):
    return SampleMetrics(10, generated, ttft_s, tpot_s, retrieved)


@pytest.mark.parametrize(
    "text, answer, retrieved",
    [
        ("Mary and more", "Mary", True),
        ("  Mary", "Mary\n", True),
        ("Mar", "Mary", False),
        ("It was Mary", "Mary", False),
        ("mary", "Mary", False),
        ("", "Mary", False),
        (None, "Mary", False),
        ("anything", None, None),
    ],
)
def test_an_answer_is_retrieved_when_the_text_starts_with_it(text, answer, retrieved):
    assert SampleMetrics.of(make_result(text), answer).retrieved is retrieved


def test_a_sample_is_counted_in_tokens():
    assert SampleMetrics.of(make_result(num_tokens=5), None) == SampleMetrics(4, 5, 0.5, 0.1, None)


def test_a_run_is_summed_up_in_its_units():
    samples = [sample(1, 1.0, None, True), sample(4, 2.0, 0.2, False), sample(5, 9.0, 0.4, None)]
    assert summarize(samples, num_prompts=2, wall_s=4.0) == {
        "num_prompts": 2,
        "num_samples": 3,
        "num_prompt_tokens": 30,
        "num_generated_tokens": 10,
        "wall_s": 4.0,
        "tokens_per_s": 2.5,
        "ttft_s_p50": 2.0,
        "tpot_s_p50": pytest.approx(0.3),
        "num_answers": 2,
        "num_answers_retrieved": 1,
    }


def test_what_no_sample_tells_is_null():
    summary = summarize([], num_prompts=3, wall_s=0.0)
    assert summary["num_samples"] == summary["num_generated_tokens"] == 0
    for key in ("tokens_per_s", "ttft_s_p50", "tpot_s_p50", "num_answers", "num_answers_retrieved"):
        assert summary[key] is None
    assert summarize([sample(1, tpot_s=None)], 1, 1.0)["tpot_s_p50"] is None


def test_no_answer_retrieved_is_zero_and_not_null():
    summary = summarize([sample(retrieved=False)], 1, 1.0)
    assert (summary["num_answers"], summary["num_answers_retrieved"]) == (1, 0)


def test_a_summary_is_json():
    json.loads(json.dumps(summarize([sample(retrieved=True)], 1, 1.0)))


def test_people_get_one_aligned_line_for_each_number():
    text = format_summary({"num_prompts": 12345, "wall_s": 0.123456, "x": None, "flag": True, "tokens_per_s": 98765.4})
    lines = text.splitlines()
    assert [line.split() for line in lines] == [
        ["num_prompts", "12,345"],
        ["wall_s", "0.1235"],
        ["x", "None"],
        ["flag", "True"],
        ["tokens_per_s", "98,765"],
    ]
    assert len({line.index(line.split()[1], len(line.split()[0]) + 2) for line in lines}) == 1
