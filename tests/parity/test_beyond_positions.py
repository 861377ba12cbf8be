"""Positions beyond a config's max_position_embeddings: as Transformers has them, where it has them in one way."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine_parity import generate, grid_name
from transformers import LlamaConfig

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import TINY, make_model, prompts_of

GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2)]
MOST = 64
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": MOST},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
}
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
# Across the end of the positions, and all beyond it.
PROMPTS = prompts_of((MOST - 4, 3 * MOST + 5), vocab_size=128)


def model_with(kind: str) -> Any:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    return make_model(LlamaConfig(**{**TINY, "max_position_embeddings": MOST}, rope_parameters=rope))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("kind", ["default", "yarn", "linear", "llama3"])
def test_tokens_and_logprobs_equal_transformers(kind: str, grid: RankGrid) -> None:
    model = model_with(kind)
    results = generate(model, grid, PROMPTS, GREEDY, max_model_len=4 * MOST, max_num_batched_tokens=48)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert list(result.token_ids) == check_rollout.generate_greedy(model, prompt, 8)
        raw = check_rollout.score(model, prompt, result.token_ids)
        assert (raw - torch.tensor(result.logprobs)).abs().max() <= 1e-4


def test_yarn_reaches_as_far_as_it_stretches_without_being_asked() -> None:
    assert len(generate(model_with("yarn"), RankGrid(), PROMPTS, GREEDY)[1].token_ids) == 8
    long_answer = replace(GREEDY, max_new_tokens=1000)
    (result,) = generate(model_with("yarn"), RankGrid(), PROMPTS[1:], long_answer)
    assert len(result.token_ids) == 4 * MOST - len(PROMPTS[1]) and result.finish_reason == "length"


def test_positions_that_are_not_asked_for_are_none() -> None:
    with pytest.raises(
        UserError, match=r"64 positions, one of them for an answer\. Shorten it, or raise max_model_len"
    ):
        generate(model_with("linear"), RankGrid(), PROMPTS[1:], GREEDY)
    (result,) = generate(model_with("default"), RankGrid(), [[1, 2, 3]], GREEDY, max_model_len=8)
    assert len(result.token_ids) == 5


@pytest.mark.parametrize(
    ("kind", "max_model_len", "is_warned"),
    [("yarn", None, False), ("yarn", 4 * MOST, False), ("yarn", 5 * MOST, True), ("default", MOST + 1, True)],
)
def test_more_than_the_model_was_made_for_is_warned_of(
    kind: str, max_model_len: int | None, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="cpinfer"),
        cpinfer.attach(model_with(kind), max_model_len=max_model_len, kv_cache_gib=2**-7),
    ):
        pass
    warned = [record.getMessage() for record in caplog.records if "max_model_len" in record.getMessage()]
    assert len(warned) == is_warned


def test_dynamic_is_refused_beyond_them_because_no_two_ways_of_transformers_agree() -> None:
    """Its frequencies are those of the longest sequence that the module has seen: with a cache K keep what they had
    when they were made, and a sequence that ran before changes the next one."""
    with pytest.raises(UnsupportedError, match=r'max_model_len=256 .* rope_type "dynamic"'):
        generate(model_with("dynamic"), RankGrid(), PROMPTS, GREEDY, max_model_len=4 * MOST)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        whole = model_with("dynamic")(ids).logits[0, -1]
        model = model_with("dynamic")
        cache = model(ids[:, :-20], use_cache=True).past_key_values
        for place in range(ids.shape[1] - 20, ids.shape[1]):
            out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    assert (whole - out.logits[0, -1]).abs().max() > 1e-3
    # Where RoPE does not depend on the length they do.
    with torch.no_grad():
        whole = model_with("linear")(ids).logits[0, -1]
        model = model_with("linear")
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        out = model(ids[:, -1:], past_key_values=cache, use_cache=True)
    assert (whole - out.logits[0, -1]).abs().max() < 1e-4
