"""Laws of the model of cost, on layouts, models and work that nobody thought of."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.layout.advice import legal_layouts
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.cost_model import Link, Rates, decode_step, prefill
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.machines import MACHINES
from cpinfer.layout.planning import PlannedModel, Work, plan_layouts
from cpinfer.layout.step_traffic import ModelSizes

LAW = settings(max_examples=25, deadline=None, derandomize=True)
RATES = Rates(((1, 1e10), (64, 1e12)), 2e11, 1e10, Link(1e9, 1e-5), step_s=1e-4, layer_s=1e-5, row_s=1e-6)


@st.composite
def models(draw):
    """Sizes of GQA or of latents, of windows and experts."""
    num_layers = draw(st.integers(1, 3))
    windows = tuple(draw(st.sampled_from([None, None, 7, 300])) for _ in range(num_layers))
    num_experts = draw(st.sampled_from([0, 8]))
    model = ModelSizes(
        num_layers=num_layers,
        hidden_size=64,
        vocab_size=100,
        num_q_heads=8,
        num_kv_heads=draw(st.sampled_from([1, 2, 4, 8])),
        kv_head=KVLayout(1, 16, 16),
        layer_params=30_000 * num_layers,
        windows=windows,
        num_experts=num_experts,
        experts_per_token=2 if num_experts else 0,
        expert_params=5_000 if num_experts else 0,
    )
    if draw(st.booleans()):
        latent = KVLayout(1, 40, 32, v_is_prefix_of_k=True)
        model = replace(model, num_kv_heads=1, kv_head=latent, expanded_head=(24, 16), expand_params=9_000)
    return model


@st.composite
def laid_out(draw):
    """A model, and a legal layout of it."""
    model = draw(models())
    options = legal_layouts(draw(st.sampled_from([1, 2, 4, 8])), model.num_q_heads, model.num_kv_heads)
    return model, draw(st.sampled_from(options)).grid


lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=9)
slower = st.sampled_from(
    [
        {"product_flops": ((1, 1e9), (64, 1e11))},
        {"attention_flops": 1e10},
        {"memory_bandwidth": 1e9},
        {"link": Link(1e8, 1e-5)},
        {"link": Link(1e9, 1e-3)},
        {"step_s": 1e-2, "layer_s": 1e-3, "row_s": 1e-3},
        {"network": Link(1e7, 1e-2), "ranks_per_host": 1},
    ]
)


@LAW
@given(laid_out(), lengths, st.sampled_from([512, 2**20]), slower)
def test_a_slower_machine_is_never_quicker_and_nothing_takes_less_than_nothing(case, lens, step_tokens, changed):
    model, grid = case
    for cost in (
        lambda rates: decode_step(model, grid, rates, lens),
        lambda rates: prefill(model, grid, rates, lens, step_tokens),
    ):
        step, other = cost(RATES), cost(replace(RATES, **changed))
        assert 0 < step.seconds <= other.seconds * (1 + 1e-9)
        assert min(step.products, step.attention, step.links, step.host) >= 0
        assert step.seconds == pytest.approx(step.products + step.attention + step.links + step.host)
        assert (step.links == 0) == (grid.ranks_per_replica == 1)


@LAW
@given(models(), lengths)
def test_prefill_in_chunks_computes_the_pairs_of_prefill_at_once(model, lens):
    whole, chunks = (prefill(model, RankGrid(), RATES, lens, n) for n in (2**20, 500))
    assert chunks.attention == pytest.approx(whole.attention)


@LAW
@given(laid_out(), lengths)
def test_one_token_more_in_any_cache_never_takes_less(case, lens):
    model, grid = case
    step = decode_step(model, grid, RATES, lens).seconds
    assert decode_step(model, grid, RATES, [n + 1 for n in lens]).seconds >= step * (1 - 1e-12)


@settings(LAW, max_examples=10)
@given(models(), st.integers(1, 30_000), st.integers(1, 300), st.sampled_from([0.1, 1, 80]), st.sampled_from([4, 8]))
def test_every_layout_is_in_a_plan_once_those_that_fit_first_and_by_their_seconds(model, prompt, batch, gib, num_gpus):
    options = legal_layouts(num_gpus, model.num_q_heads, model.num_kv_heads, ranks_per_host=4)
    machine = replace(MACHINES["h100"], gpu_bytes=(2 + gib) * 2**30)
    work = Work(prompt, 10, batch)
    plans = plan_layouts(options, PlannedModel(model, 2 * model.layer_params, 12_800, 128), machine, work)
    assert sorted(map(str, (plan.option for plan in plans))) == sorted(map(str, options))
    fits = [plan.unfit is None for plan in plans]
    assert fits == sorted(fits, reverse=True)
    seconds = [plan.seconds for plan in plans if plan.seconds is not None]
    assert seconds == sorted(seconds) and len(seconds) == sum(fits)
    for plan in plans:
        assert (plan.unfit is None) == (0 < plan.memory.kv_of_sequence <= plan.memory.kv_pool)
        assert plan.unfit is not None or 1 <= plan.sequences_at_once <= batch
