"""Sampling options through the whole engine, on one rank and on two: what comes out is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine_parity import generate, grid_name

from cpinfer.config import SamplingParams, parse_config
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of

GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2), RankGrid(pcp_size=2, dcp_size=1)]
PROMPTS = prompts_of((5, 40, 17), vocab_size=128)


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
    late = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=stops, min_new_tokens=5)
    for result in generate(model, grid, PROMPTS, late):
        assert len(result.token_ids) >= 5
        assert not set(result.token_ids[:4]) & set(stops)


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
