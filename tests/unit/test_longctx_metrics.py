"""Metrics say what RULER's and gsm8k's say, on answers where the careless ones differ."""

import pytest

from cpinfer_tools.evaluation.longctx.metrics import METRICS, flexible_answer, strict_answer


def score(metric, prediction, *references):
    return METRICS[metric](prediction, references)


@pytest.mark.parametrize(
    "prediction, references, wanted",
    [
        ("17", ["17"], 1.0),
        ("It is 17.", ["17", "18"], 0.5),
        ("ALPHA beta", ["alpha", "BETA"], 1.0),
        ("", ["17"], 0.0),
        ("1 7", ["17"], 0.0),
        ("a\x00b", ["a\nb"], 1.0),  # RULER reads control characters as line breaks
        ("17 17", ["17", "18", "19", "20"], 0.25),
    ],
)
def test_string_match_all_is_the_share_of_references_found(prediction, references, wanted):
    assert score("string_match_all", prediction, *references) == wanted


def test_string_match_part_wants_one_of_them():
    assert score("string_match_part", "It is 17.", "17", "18") == 1.0
    assert score("string_match_part", "It is 19.", "17", "18") == 0.0


@pytest.mark.parametrize(
    "prediction, strict, flexible",
    [
        ("7 + 5 = 12. #### 12", 1.0, 1.0),
        ("7 + 5 = 12.", 0.0, 1.0),
        ("#### 12\nSo 13 is wrong", 1.0, 0.0),
        ("The answer is $12.", 0.0, 1.0),
        ("#### 1,2", 1.0, 1.0),
        ("twelve", 0.0, 0.0),
        ("-12", 0.0, 0.0),
        ("#### 12.", 1.0, 1.0),
        ("", 0.0, 0.0),
    ],
)
def test_exact_match_reads_the_marked_or_the_last_number(prediction, strict, flexible):
    assert score("exact_match_strict", prediction, "12") == strict
    assert score("exact_match_flexible", prediction, "12") == flexible


def test_numbers_are_found_as_they_stand():
    assert strict_answer("a #### -1,234.5 b") == "-1,234.5"
    assert flexible_answer("1 and 2, or -3.5") == "-3.5"
    assert strict_answer("12") is None and flexible_answer("none.") is None


def test_every_metric_is_in_0_to_1_and_1_for_the_reference_itself():
    for metric in METRICS:
        assert score(metric, "#### 12", "12") == 1.0
        assert score(metric, "no", "12") == 0.0
