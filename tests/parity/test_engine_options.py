"""Sampling options through the whole engine, on one rank and on two: what comes out is the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_parity import generate, grid_name
from transformers import AutoTokenizer

from cpinfer.config import SamplingParams, parse_config
from cpinfer.errors import EngineFaultError, NoTokenError, UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of

GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2), RankGrid(pcp_size=2, dcp_size=1)]
PROMPTS = prompts_of((5, 40, 17), vocab_size=128)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "configs" / "recall-tiny")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(FAMILIES["qwen2"])


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_biased_token_is_always_or_never_chosen(model: Any, grid: RankGrid) -> None:
    plain = generate(model, grid, PROMPTS, SamplingParams(temperature=0, max_new_tokens=6))
    favourite = plain[0].token_ids[0]
    never = SamplingParams(temperature=0, max_new_tokens=6, logit_bias=((favourite, -1e4),))
    assert all(favourite not in r.token_ids for r in generate(model, grid, PROMPTS, never))
    always = SamplingParams(temperature=1, max_new_tokens=6, logit_bias=((7, 1e4),))
    for result in generate(model, grid, PROMPTS, always):
        assert set(result.token_ids) == {7}
        # The raw distribution knows nothing of the bias.
        raw = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert (raw - torch.tensor(result.logprobs)).abs().max() <= 1e-4
        assert max(map(abs, result.processed_logprobs)) <= 1e-6


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_nothing_ends_before_min_new_tokens(model: Any, grid: RankGrid) -> None:
    free = generate(model, grid, PROMPTS, SamplingParams(temperature=0, max_new_tokens=12))
    stops = tuple({r.token_ids[1] for r in free})
    early = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=stops)
    assert all(len(r.token_ids) <= 2 for r in generate(model, grid, PROMPTS, early))
    for num_tokens in (1, 3, 5):
        late = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=stops, min_new_tokens=num_tokens)
        for prompt, result in zip(PROMPTS, generate(model, grid, PROMPTS, late), strict=True):
            assert list(result.token_ids) == by_transformers(
                model, prompt, max_new_tokens=12, min_new_tokens=num_tokens, eos_token_id=list(stops)
            )
            assert len(result.token_ids) > num_tokens and not set(result.token_ids[:num_tokens]) & set(stops)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_stop_strings_of_special_tokens_end_answers_as_in_transformers(
    model: Any, grid: RankGrid, tokenizer: Any
) -> None:
    """Alone, before and behind other text; the text that is shown has none of them, and ends where they begin."""
    (answer,) = generate(model, grid, PROMPTS[:1], SamplingParams(temperature=0, max_new_tokens=12), tokenizer)
    place, special = 4, tokenizer.decode([answer.token_ids[4]])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [special]})
    assert special not in tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    before, after = (tokenizer.decode([answer.token_ids[i]]) for i in (place - 1, place + 1))
    for stop, num_tokens in ((special, place + 1), (before + special, place + 1), (special + after, place + 2)):
        params = SamplingParams(temperature=0, max_new_tokens=12, stop=(stop,))
        (ended,) = generate(model, grid, PROMPTS[:1], params, tokenizer)
        assert list(ended.token_ids) == by_transformers(
            model, PROMPTS[0], max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer
        )
        assert ended.token_ids == answer.token_ids[:num_tokens] and ended.finish_reason == "stop"
        assert ended.text == tokenizer.decode(
            answer.token_ids[: place - (stop[0] != special)], skip_special_tokens=True
        )


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_stop_string_within_the_minimum_neither_ends_nor_cuts(model: Any, grid: RankGrid, tokenizer: Any) -> None:
    (free,) = generate(model, grid, PROMPTS[:1], SamplingParams(temperature=0, max_new_tokens=12), tokenizer)
    stop = tokenizer.decode([free.token_ids[3]])
    params = SamplingParams(temperature=0, max_new_tokens=12, stop=(stop,), min_new_tokens=12)
    (whole,) = generate(model, grid, PROMPTS[:1], params, tokenizer)
    assert whole.token_ids == free.token_ids and whole.text == free.text and whole.finish_reason == "length"


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_vocabulary_that_a_hook_rules_out_is_no_fault(model: Any, grid: RankGrid, temperature: float) -> None:
    masked = mask_all_but(model, range(64))
    sampling = SamplingParams(temperature=temperature, max_new_tokens=6, top_logprobs=2)
    for prompt, result in zip(PROMPTS, generate(masked, grid, PROMPTS, sampling), strict=True):
        assert max(result.token_ids) < 64
        logprobs = check_rollout.score(masked, prompt, result.token_ids)
        assert (logprobs - torch.tensor(result.logprobs)).abs().max() <= 1e-4
        if not temperature:
            assert list(result.token_ids) == by_transformers(masked, prompt, max_new_tokens=6)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_request_that_is_left_without_a_token_is_an_error_by_name(model: Any, grid: RankGrid) -> None:
    ends = SamplingParams(temperature=0, max_new_tokens=6, min_new_tokens=2, stop_token_ids=(7, 9))
    with pytest.raises(NoTokenError, match=r'prompt "0/0/call-0/0", sample 0: .* behind 0 of the answer'):
        generate(mask_all_but(model, (7, 9)), grid, PROMPTS[:1], ends)
    with pytest.raises(EngineFaultError, match="-inf for every token"):
        generate(mask_all_but(model, ()), grid, PROMPTS[:1], SamplingParams(max_new_tokens=6))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("num_batched", [8192, 48])
def test_prompts_that_begin_alike_in_one_step_answer_as_they_do_alone(
    model: Any, grid: RankGrid, num_batched: int
) -> None:
    """Equal ones, and ones that part after a while; all are new, so none finds the prefix of another cached."""
    (shared,) = prompts_of((64,), vocab_size=128)
    prompts = [shared] * 8 + [[*shared[:40], *prompt] for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_new_tokens=6)
    results = generate(model, grid, prompts, sampling, max_num_batched_tokens=num_batched)
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.token_ids) == by_transformers(model, prompt, max_new_tokens=6)
        raw = check_rollout.score(model, prompt, result.token_ids)
        assert (raw - torch.tensor(result.logprobs)).abs().max() <= 1e-4
    drawn = generate(model, grid, [shared] * 4, SamplingParams(max_new_tokens=6, seed=5))
    assert len({r.token_ids for r in drawn}) > 1, "each has random numbers of its own"


def mask_all_but(model: Any, tokens: Any) -> Any:
    """A copy whose logits are -inf elsewhere."""
    masked, mask = copy.deepcopy(model), torch.full((128,), -torch.inf)
    mask[list(tokens)] = 0.0
    masked.lm_head.register_forward_hook(lambda module, args, logits: logits + mask)
    return masked


def by_transformers(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What `generate` writes, greedily."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_top_logprobs_are_the_likeliest_tokens_of_the_raw_distribution(model: Any, grid: RankGrid) -> None:
    sampling = SamplingParams(temperature=0.7, max_new_tokens=5, top_logprobs=3, seed=3)
    for result in generate(model, grid, PROMPTS, sampling):
        assert result.top_logprobs is not None and len(result.top_logprobs) == 5
        ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
        with torch.no_grad():
            raw = torch.log_softmax(model(ids).logits[0, len(result.prompt_token_ids) - 1 : -1], dim=-1)
        for place, top in enumerate(result.top_logprobs):
            values, tokens = raw[place].topk(3)
            assert [token for token, _ in top] == tokens.tolist()
            assert [p for _, p in top] == pytest.approx(values.tolist(), abs=1e-4)
    plain = generate(model, grid, PROMPTS, SamplingParams(temperature=0.7, max_new_tokens=5, seed=3))
    assert all(r.top_logprobs is None for r in plain)


def test_options_are_read_from_json_and_checked() -> None:
    params = parse_config({"sampling": {"logit_bias": {"3": -1, "12": 2.5}, "min_new_tokens": 2}}).sampling
    assert params.logit_bias == ((3, -1.0), (12, 2.5))
    for bad in ({"logit_bias": {"x": 1}}, {"logit_bias": {"3": "a"}}, {"min_new_tokens": -1}, {"top_logprobs": -1}):
        with pytest.raises(UserError):
            parse_config({"sampling": bad})
