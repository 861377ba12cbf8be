"""Scores of given continuations on ranks as threads, against one forward of the unsharded model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine import scheduler as scheduler_module
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of

TOLERANCE = 1e-4
SHARED, OTHER = prompts_of((90, 40), 128)
# Choices of one question, a continuation that is most of the text, single tokens.
PAIRS = [
    *((SHARED, choice) for choice in prompts_of((1, 4, 30), 128)),
    (OTHER, prompts_of((120,), 128)[0]),
    (OTHER[:1], [5]),
    (OTHER[:1], prompts_of((77,), 128)[0]),
]


def config_of(grid: RankGrid, **changes: Any) -> cpinfer.JobConfig:
    return parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            "block_size": 4,
            "kv_cache_gib": 2**-8,
            **changes,
        }
    )


@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(1, 2, 2), RankGrid(1, 4, 2)], ids=str)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"enable_prefix_caching": False}),
        ("gpt_oss", {"max_num_batched_tokens": 33}),
        ("deepseek_v3", {"max_num_batched_tokens": 33}),
    ],
    ids=str,
)
def test_scores_are_those_of_one_forward(family: str, changes: dict[str, Any], grid: RankGrid) -> None:
    model = make_model(FAMILIES[family])

    def body(topology: cpinfer.Topology) -> Any:
        with cpinfer.attach(copy.deepcopy(model), topology, config_of(grid, **changes)) as engine:
            return engine.score(PAIRS), engine.generate([SHARED], SamplingParams(temperature=0, max_new_tokens=3))

    ranks = run_ranks(grid, body)
    assert all(scores == ranks[0][0] for scores, _ in ranks)
    for (prompt, continuation), result in zip(PAIRS, ranks[0][0], strict=True):
        expected = check_rollout.score(model, prompt, continuation)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE
        assert result.logprob == pytest.approx(float(expected.sum()), abs=len(continuation) * TOLERANCE)
        assert result.is_greedy == (check_rollout.generate_greedy(model, prompt, len(continuation)) == continuation)
    # And the engine generates as before.
    assert list(ranks[0][1][0].token_ids) == check_rollout.generate_greedy(model, SHARED, 3)


@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(1, 2, 2)], ids=str)
def test_what_the_model_would_write_is_greedy_and_nothing_else(grid: RankGrid) -> None:
    model = make_model(FAMILIES["qwen2"])
    answer = check_rollout.generate_greedy(model, SHARED, 12)
    wrong = [*answer[:-1], (answer[-1] + 1) % 128]

    def body(topology: cpinfer.Topology) -> Any:
        with cpinfer.attach(copy.deepcopy(model), topology, config_of(grid)) as engine:
            return [result.is_greedy for result in engine.score([(SHARED, answer), (SHARED, wrong)])]

    assert run_ranks(grid, body)[0] == [True, False]


def test_a_shared_prompt_is_computed_once_up_to_whole_units() -> None:
    with cpinfer.attach(make_model(FAMILIES["llama"]), config=config_of(RankGrid())) as engine:
        engine.score([(SHARED, choice) for choice in prompts_of((1, 4, 30), 128)])
        # Units of 4 tokens; what predicts the first token of a choice, the 90th, is computed for each of them.
        assert engine.stats.num_cached_prefill_tokens == 2 * 88
        assert engine.stats.num_computed_prefill_tokens == 90 + (2 + 3) + (2 + 29)


def test_few_rows_have_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_SCORED_POSITIONS", 7)
    model = make_model(FAMILIES["llama"])
    [long] = prompts_of((100,), 128)
    with cpinfer.attach(copy.deepcopy(model), config=config_of(RankGrid())) as engine:
        rows = []
        forward = engine._runner.forward
        monkeypatch.setattr(engine._runner, "forward", lambda *args: rows.append(len(args[3])) or forward(*args))
        results = engine.score([(OTHER, long), (SHARED, long[:9])])
    assert max(rows) <= 7
    for prompt, continuation, result in ((OTHER, long, results[0]), (SHARED, long[:9], results[1])):
        expected = check_rollout.score(model, prompt, continuation)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE


def test_a_text_that_fills_every_position_is_scored_to_its_last_token() -> None:
    model = make_model(FAMILIES["llama"])
    [prompt, continuation] = prompts_of((1, 512), 128)
    with cpinfer.attach(copy.deepcopy(model), config=config_of(RankGrid())) as engine:
        assert engine.max_positions == 512
        [result] = engine.score([(prompt, continuation)])
        with pytest.raises(cpinfer.UserError, match="513 to compute; the model has 512 positions"):
            engine.score([(prompt, [*continuation, 1])])
    expected = check_rollout.score(model, prompt, continuation)
    assert (expected - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE


def test_bad_pairs_are_refused_before_anything_runs() -> None:
    with cpinfer.attach(make_model(FAMILIES["llama"]), config=config_of(RankGrid())) as engine:
        assert engine.score([]) == []
        for pair, complaint in (
            (([1], []), "pair 0: the continuation is empty"),
            (([], [1]), "pair 0: the prompt is empty"),
            (([1], [128]), "pair 0: token id 128 is outside the vocabulary"),
            (([1] * 500, [1] * 20), "512 positions"),
        ):
            with pytest.raises(cpinfer.UserError, match=complaint):
                engine.score([pair])
        engine.sleep()
        with pytest.raises(RuntimeError, match="wake"):
            engine.score([([1], [2])])
