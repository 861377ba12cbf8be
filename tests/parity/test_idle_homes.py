"""Decode steps in which a home has no sequence: its ranks run no model, unless others would wait for them in it."""

import copy
from dataclasses import replace
from unittest import mock

import pytest

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from cpinfer.models.runner import ModelRunner
from tiny_models import FAMILIES, make_model, prompts_of

PROMPTS = prompts_of((20, 30), vocab_size=128)
SHORT, LONG = 2, 9


def generate(model, topology=None):
    """Tokens of a short answer and of a long one, and how often this rank has run the model for them."""
    sampling = [SamplingParams(temperature=0, max_new_tokens=n, ignore_eos=True) for n in (SHORT, LONG)]
    with cpinfer.attach(model, topology, dtype="float32", kv_cache_gib=0.001) as engine:
        runner, num_forwards = engine._runner, 0

        def counted(*given, forward=runner.forward, **named):
            nonlocal num_forwards
            num_forwards += 1
            return forward(*given, **named)

        with mock.patch.object(runner, "forward", counted):
            results = engine.generate(PROMPTS, sampling)
        return [result.token_ids for result in results], num_forwards


@pytest.mark.parametrize("family", ["qwen2", "qwen3_next"])
@pytest.mark.parametrize("gathers", [False, True], ids=["kept", "gathered"])
def test_the_home_of_a_finished_answer_rests_unless_others_would_wait_for_it(family, gathers):
    model = make_model(copy.deepcopy(FAMILIES[family]))
    expected, num_steps = generate(copy.deepcopy(model))
    assert num_steps == LONG, "a prefill, and a token in each step behind it"

    grid = RankGrid(pcp_size=2)
    with mock.patch.object(ModelRunner, "weights_come_and_go", gathers):
        found = run_ranks(grid, lambda topology: generate(copy.deepcopy(model), topology))
    assert [tokens for tokens, _ in found] == [expected] * 2
    rests = not gathers and family == "qwen2"  # states of linear attention travel along the pcp axis
    assert sorted(num for _, num in found) == ([SHORT, LONG] if rests else [LONG, LONG])


def test_ranks_of_a_home_that_has_a_sequence_all_run_the_model():
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    expected, _ = generate(copy.deepcopy(model))
    grid = replace(RankGrid(pcp_size=2), dcp_size=2)
    found = run_ranks(grid, lambda topology: generate(copy.deepcopy(model), topology))
    assert found == [(expected, LONG)] * 2
