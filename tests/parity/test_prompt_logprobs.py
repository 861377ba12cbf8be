"""Logprobs of a prompt's own tokens: those of Transformers' forward, whatever is cached, shared or computed again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine_parity import generate, grid_name

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams
from cpinfer.engine.request import RolloutResult
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2), RankGrid(pcp_size=2, dcp_size=1)]
PROMPTS = prompts_of((1, 5, 100, 2, 37), vocab_size=128)
SCORED = SamplingParams(temperature=0, max_new_tokens=4, prompt_logprobs=True, top_logprobs=3)


@pytest.fixture(scope="module", params=["llama", "mistral", "deepseek_v3"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(FAMILIES[request.param])


def check(model: Any, result: RolloutResult) -> None:
    """What is said of the prompt is what the model's own forward says."""
    with torch.no_grad():
        logits = model(torch.tensor([result.prompt_token_ids])).logits[0, :-1]
    raw = torch.log_softmax(logits.float(), dim=-1)
    found, tops = result.prompt_logprobs, result.prompt_top_logprobs
    assert found is not None and tops is not None
    assert len(found) == len(tops) == len(result.prompt_token_ids)
    assert found[0] is None and tops[0] == ()
    wanted = raw.gather(-1, torch.tensor(result.prompt_token_ids[1:], dtype=torch.long)[:, None]).squeeze(-1)
    assert list(found[1:]) == pytest.approx(wanted.tolist(), abs=1e-4)
    for row, top in zip(raw, tops[1:], strict=True):
        values, tokens = row.topk(3)
        assert [p for _, p in top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [t for t, _ in top] == tokens.tolist() or values.diff().abs().min() < 1e-4


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_they_are_those_of_the_forward_and_answers_stay_what_they_are(model: Any, grid: RankGrid) -> None:
    plain = generate(model, grid, PROMPTS, replace(SCORED, prompt_logprobs=False, top_logprobs=0))
    assert all(r.prompt_logprobs is None and r.prompt_top_logprobs is None for r in plain)
    results = generate(model, grid, PROMPTS, SCORED, max_num_batched_tokens=48)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    for result in results:
        check(model, result)
    without_top = generate(model, grid, PROMPTS[:2], replace(SCORED, top_logprobs=0))
    assert without_top[1].prompt_logprobs is not None and results[1].prompt_logprobs is not None
    assert without_top[1].prompt_logprobs[1:] == pytest.approx(results[1].prompt_logprobs[1:], abs=1e-4)
    assert all(r.prompt_top_logprobs is None for r in without_top)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=grid_name)
def test_samples_share_them_and_the_prefix_cache_takes_none_away(grid: RankGrid) -> None:
    model = make_model(FAMILIES["llama"])
    sampling = replace(SCORED, temperature=1.0, n=3)

    def body(topology: cpinfer.Topology) -> None:
        config = {"dtype": "float32", "kv_cache_gib": 2**-7}
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            engine.generate(PROMPTS[2:3], replace(sampling, prompt_logprobs=False))
            for result in engine.generate([*PROMPTS[2:4], PROMPTS[2]], sampling):
                check(model, result)
            # All of three prompts: twice the one that is cached, for its samples once.
            assert engine.stats.num_computed_prefill_tokens == 2 * len(PROMPTS[2]) + len(PROMPTS[3])
            engine.generate(PROMPTS[2:3], replace(sampling, prompt_logprobs=False))
            assert engine.stats.num_cached_prefill_tokens > 0

    run_ranks(grid, body)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=grid_name)
def test_a_pool_that_is_tight_computes_again_and_scores_once(grid: RankGrid) -> None:
    model = make_model(FAMILIES["llama"])
    prompts = prompts_of([60] * 6, vocab_size=128)
    sampling = replace(SCORED, temperature=1.0, n=4, max_new_tokens=24)
    roomy = generate(model, grid, prompts, sampling)
    # A token takes 256 bytes here: room for about three sequences of 84.
    config = {"dtype": "float32", "kv_cache_gib": 18 * 16 * 256 / 2**30 / grid.dcp_size, "block_size": 4}

    def body(topology: cpinfer.Topology) -> None:
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            results = engine.generate(prompts, sampling)
            assert engine.stats.num_preemptions > 0
        assert [r.token_ids for r in results] == [r.token_ids for r in roomy]
        for result in results:
            check(model, result)

    run_ranks(grid, body)


def test_a_token_that_the_model_rules_out_has_no_chance() -> None:
    model = make_model(FAMILIES["llama"])
    mask = torch.zeros(128)
    mask[PROMPTS[1][2]] = -torch.inf
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + mask)
    (result,) = generate(model, RankGrid(), PROMPTS[1:2], SCORED)
    assert result.prompt_logprobs is not None and result.prompt_logprobs[2] == -torch.inf
