"""Random generation beside Transformers' `generate`: the same tokens, logprobs, texts and endings, whatever is asked.

A failure names its seed: `differences(case_of(seed))` repeats it. The negative controls ask Transformers for something
else than us, one option at a time, or stop by another rule, and must be seen.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StopStringCriteria

from cpinfer.config import SamplingParams
from every_family import OFTEN
from generation_cases import Case, case_of, stop_of_transformers
from generation_fuzz import Answers, Comparison, StopRule, compare, ours, shown_text, stop_begins_at
from small_tokenizers import KINDS, SPECIAL, VOCAB_SIZE, tokenizer_of

NUM_CASES = 60
# Of the long run; each range is one test.
RANGES = [range(start, start + 100) for start in range(1000, 2500, 100)]
# Answers in which a token stands where rounding decides.
MAX_TIES = 0.01


@functools.cache
def answers_of(seed: int) -> Answers:
    return ours(case_of(seed))


@functools.cache
def comparison_of(seed: int) -> Comparison:
    return compare(case_of(seed), answers_of(seed))


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_an_answer_is_that_of_transformers(seed: int) -> None:
    assert comparison_of(seed).differences == [], case_of(seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seeds", RANGES, ids=lambda seeds: f"{seeds.start}_to_{seeds.stop - 1}")
def test_many_answers_are_those_of_transformers(seeds: range) -> None:
    found = [compare(case, ours(case)) for case in map(case_of, seeds)]
    assert [what for comparison in found for what in comparison.differences] == []
    assert sum(c.num_ties for c in found) <= MAX_TIES * sum(c.num_answers for c in found)


def test_the_cases_reach_what_they_are_to_try() -> None:
    cases = [case_of(seed) for seed in range(NUM_CASES)]
    found = [comparison_of(case.seed) for case in cases]
    assert sum(c.num_ties for c in found) <= MAX_TIES * sum(c.num_answers for c in found)
    endings = sum((c.endings for c in found), Counter[str]())
    assert min(endings[kind] for kind in ("stop string", "stop token", "length")) > 20, endings
    assert {case.family for case in cases} == set(OFTEN)
    assert {case.grid.world_size for case in cases} == {1, 2, 3, 4}
    assert sum(case.masks_vocabulary for case in cases) > 5
    assert sum(case.transformers_stops for case in cases) > 5
    stats = [each for case in cases for each in answers_of(case.seed).stats]
    assert sum(each.num_preemptions > 0 for each in stats) > 3
    assert sum(each.num_cached_prefill_tokens > 0 for each in stats) > 10
    texts = [(r.text or "", r.token_ids) for case in cases for r in answers_of(case.seed).results]
    assert sum(any(wide in text for wide in "é日本🙂") for text, _ in texts) > 20
    given = Counter(option for case in cases for options in case.options for option in options)
    # Experts change no token; test_routed_experts.py compares them, in layouts of its own.
    missing = {field.name for field in dataclasses.fields(SamplingParams)} - set(given) - {"routed_experts"}
    assert not missing, f"no case says {missing}"


# --- the fuzzer's own rules ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_of_stop_strings_is_that_of_transformers(kind: str) -> None:
    tokenizer, num_stopped = tokenizer_of(kind), 0
    for seed in range(150):
        r = random.Random(seed)
        stops = [stop_of_transformers(r) for _ in range(r.choice((1, 2)))]
        theirs = StopStringCriteria(tokenizer, stops)
        few = r.sample(range(VOCAB_SIZE), r.choice((12, VOCAB_SIZE)))
        tokens = [r.choice(few) for _ in range(16)]
        for num in range(1, len(tokens) + 1):
            stopped = stop_begins_at(tokenizer, tokens[:num], SamplingParams(stop=tuple(stops))) is not None
            assert stopped == bool(theirs(torch.tensor([tokens[:num]]), None)), (stops, tokens[:num])
            num_stopped += stopped
    assert num_stopped > 100


def test_a_stop_string_that_begins_in_the_prompt_is_one_for_transformers_alone() -> None:
    tokenizer = tokenizer_of("byte_level")
    prompt = tokenizer("abc d")["input_ids"]
    free: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
    case = Case(0, "qwen2", "byte_level", (), 2, 2, {}, (tuple(prompt),), (free,))
    [answer] = ours(case).results
    stop = "d" + tokenizer.decode(answer.token_ids)[0]
    stopping = dataclasses.replace(case, options=({**free, "stop": (stop,)},))
    answers = ours(stopping)
    assert answers.results[0].token_ids == answer.token_ids
    assert compare(stopping, answers).differences == []
    assert compare(dataclasses.replace(stopping, transformers_stops=True), answers).differences


def test_the_rule_of_shown_text_leaves_out_what_is_special_in_it() -> None:
    tokenizer, num_shown = tokenizer_of("byte_level"), 0
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    for seed in range(300):
        r = random.Random(seed)
        tokens = [r.randrange(VOCAB_SIZE) for _ in range(r.randint(1, 12))]
        text = tokenizer.decode(tokens)
        if "\ufffd" in text:  # bytes on both sides of a special token come together without it
            continue
        for end in range(len(text)):
            hidden = {place for found in special.finditer(text) for place in range(*found.span())}
            expected = "".join(text[place] for place in range(end) if place not in hidden)
            assert shown_text(tokenizer, tokens, end) == expected, (tokens, end)
            num_shown += 1
    assert num_shown > 1000


# --- negative controls ---

Change = Callable[[SamplingParams], SamplingParams]


def without(key: str) -> Change:
    """The option left at its default."""
    default = getattr(SamplingParams(temperature=0), key)
    return lambda params: dataclasses.replace(params, **{key: default})


def one_less(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, min_new_tokens=max(0, params.min_new_tokens - 1))


def one_more(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, max_new_tokens=params.max_new_tokens + 1)


def warmer(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, temperature=params.temperature * 1.01)


def cooler_bias(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, logit_bias=tuple((token, bias * 0.9) for token, bias in params.logit_bias))


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(without(key), id=f"without_{key}") for key in ("top_k", "top_p", "min_p", "repetition_penalty")),
        *(pytest.param(without(key), id=f"without_{key}") for key in ("stop", "stop_token_ids", "ignore_eos")),
        *(
            pytest.param(without(key), id=f"without_{key}")
            for key in ("logit_bias", "min_new_tokens", "prompt_logprobs")
        ),
        one_less,
        one_more,
        warmer,
        cooler_bias,
    ],
)
def test_an_option_that_transformers_has_otherwise_is_seen(change: Change) -> None:
    cases = [case for case in map(case_of, range(NUM_CASES)) if any(change(p) != p for p in case.sampling)]
    assert any(compare(case, answers_of(case.seed), change).differences for case in cases)


def without_special_tokens(tokenizer: Any, tokens: Any, params: SamplingParams) -> int | None:
    special = set(tokenizer.all_special_ids)
    return None if tokens[-1] in special else stop_begins_at(tokenizer, [t for t in tokens if t not in special], params)


def whatever_the_minimum(tokenizer: Any, tokens: Any, params: SamplingParams) -> int | None:
    return stop_begins_at(tokenizer, tokens, dataclasses.replace(params, min_new_tokens=0))


def at_its_first_place(tokenizer: Any, tokens: Any, params: SamplingParams) -> int | None:
    """As soon as an answer may end, by a stop string that was complete before."""
    text = tokenizer.decode(tokens)
    starts = [text.find(stop) for stop in params.stop if stop in text]
    return min(starts, default=None) if len(tokens) > params.min_new_tokens else None


@pytest.mark.parametrize("rule", [without_special_tokens, whatever_the_minimum, at_its_first_place])
def test_another_rule_of_stop_strings_is_seen(rule: StopRule) -> None:
    cases = [case for case in map(case_of, range(NUM_CASES)) if any(params.stop for params in case.sampling)]
    assert any(compare(case, answers_of(case.seed), rule=rule).differences for case in cases)
