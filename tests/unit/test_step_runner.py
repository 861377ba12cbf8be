"""Steps as the engine plans them for layers that see differently far: whole prompts, chunks after others, decode."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import JobConfig
from cpinfer.engine import step_attention
from cpinfer.engine.request import SampledRequest
from cpinfer.engine.step_plans import StepPlanner
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of

TOLERANCE = 1e-4
PROMPTS = prompts_of((3, 60, 25), vocab_size=128)
SAMPLING = cpinfer.SamplingParams(temperature=0, max_new_tokens=5)


def generate(family, window, grid, **config):
    """The model, and what an engine over it returns; `window` in place of the one it has."""
    own = copy.deepcopy(FAMILIES[family])
    own.sliding_window = window
    model = make_model(own)
    parsed = JobConfig(
        dtype="float32",
        kv_cache_gib=0.001,
        block_size=4,
        prefill_context_parallel_size=grid.pcp_size,
        decode_context_parallel_size=grid.dcp_size,
        cp_kv_cache_interleave_size=3,
        **config,
    )

    def body(topology):
        with cpinfer.attach(copy.deepcopy(model), topology, parsed) as engine:
            return engine.generate(PROMPTS, SAMPLING)

    return model, run_ranks(grid, body)[0]


def largest_error(model, results):
    return max(
        float((check_rollout.score(model, r.prompt_token_ids, r.token_ids) - torch.tensor(r.logprobs)).abs().max())
        for r in results
    )


WINDOWED = ["mistral", "gemma2", "gpt_oss"]  # on every layer; beside full attention, with a soft cap or with sinks


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 16}], ids=["whole", "chunks"])
@pytest.mark.parametrize("window", [1, 2, 9, 33])
@pytest.mark.parametrize("family", WINDOWED)
def test_windows_of_any_width_give_the_logprobs_of_transformers(family, window, config):
    assert largest_error(*generate(family, window, RankGrid(1, 2, 2), **config)) <= TOLERANCE


@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(1, 2, 1), RankGrid(1, 3, 3)], ids=str)
def test_windows_and_chunks_on_one_rank_with_homes_and_over_three_shards(grid):
    assert largest_error(*generate("gemma2", 9, grid, max_num_batched_tokens=11)) <= TOLERANCE


@pytest.mark.parametrize("other", [8, 10])
def test_a_window_off_by_one_would_be_seen(other):
    """Negative control: the engine's text under one window, scored by a model with another."""
    _, results = generate("mistral", 9, RankGrid(1, 2, 2))
    model, _ = generate("mistral", other, RankGrid())
    assert largest_error(model, results) > 100 * TOLERANCE


@pytest.mark.parametrize(("num_tokens", "expected"), [(32, "QueryContext"), (48, "KVContext")])
def test_alone_chunks_of_many_tokens_expand_the_latents_before_them(monkeypatch, num_tokens, expected):
    """The tiny model expands beyond 33 queries, whatever heads and dims its cache has; as many as a step at a time."""
    taken, lengths = set(), [0]
    for name in ("QueryContext", "KVContext"):
        made = getattr(step_attention, name)

        def noted(*args, name=name, made=made):
            taken.add(name)
            lengths.extend(window.length for window in getattr(args[0], "windows", ()))
            return made(*args)

        monkeypatch.setattr(step_attention, name, noted)
    model, config = make_model(FAMILIES["deepseek_v2"]), JobConfig(dtype="float32", max_num_batched_tokens=num_tokens)
    with cpinfer.attach(copy.deepcopy(model), config=config) as engine:
        results = engine.generate(prompts_of((5 * num_tokens,), vocab_size=128), SAMPLING)
    assert taken == {expected} and max(lengths) == (num_tokens if expected == "KVContext" else 0)
    assert largest_error(model, results) <= TOLERANCE


def test_what_is_planned_while_a_device_runs_is_what_the_next_step_would_plan(monkeypatch):
    """On CPU, as if the model still ran. A block of four tokens begins now and then, and one sample ends early."""
    model, ahead, plan_ahead = make_model(FAMILIES["gemma2"]), [], StepPlanner.plan_ahead

    def noted(planner):
        plan_ahead(planner)
        ahead.append(planner._ahead is not None)

    monkeypatch.setattr(StepPlanner, "plan_ahead", noted)
    sampling = [replace(SAMPLING, max_new_tokens=n, n=2, ignore_eos=True) for n in (14, 9, 14)]
    answers = []
    for plans_ahead in (False, True):
        config = JobConfig(dtype="float32", kv_cache_gib=0.001, block_size=4)
        with cpinfer.attach(copy.deepcopy(model), config=config) as engine:
            engine._steps._plans_ahead = plans_ahead
            answers.append([(r.token_ids, r.logprobs) for r in engine.generate(PROMPTS, sampling)])
        assert plans_ahead or not ahead
    assert answers[0] == answers[1]
    assert set(ahead) == {False, True}


@pytest.mark.parametrize("layout", [{}, {"prefill_context_parallel_size": 2, "decode_context_parallel_size": "auto"}])
def test_nothing_is_held_on_to_of_requests_that_have_ended(monkeypatch, layout):
    """They hold prompts, answers and, where asked, experts: too much to keep until the next phase."""
    model, made, init = make_model(FAMILIES["qwen2"]), [], SampledRequest.__post_init__
    num_live = []

    def noted(request):
        init(request)
        made.append(weakref.ref(request))

    monkeypatch.setattr(SampledRequest, "__post_init__", noted)
    config = JobConfig(dtype="float32", kv_cache_gib=0.001, **layout)

    def body(topology):
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            engine.generate(PROMPTS, SAMPLING)
            topology.replica.all_gather(torch.zeros(1))  # nobody is still at it
            gc.collect()
            num_live.append(sum(request() is not None for request in made))
            topology.replica.all_gather(torch.zeros(1))  # nobody is still at it

    run_ranks(RankGrid(pcp_size=2, dcp_size=2) if layout else RankGrid(), body)
    assert made and set(num_live) == {0}
