"""Weights that cpinfer slices itself for a phase: every family answers as the whole model does."""

import copy
from contextlib import nullcontext

import pytest
import torch

import cpinfer
from cpinfer.colocate.weight_slices import sliced, sliced_projections
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.errors import UnsupportedError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.local_weights import storage_bytes
from cpinfer_tools.verify import check_rollout
from every_family import OFTEN, WITHOUT_TP
from tiny_models import FAMILIES, make_model, prompts_of

SLICED = [
    pytest.param(family, marks=() if family in (*OFTEN, "qwen3_5_text") else pytest.mark.slow)
    for family in FAMILIES
    if family != "gpt_bigcode" and family not in WITHOUT_TP
]


def whole(_parameters):
    return nullcontext()


def generate(family, grid, spoil=None):
    """Greedy results of every rank, its slices cut from a model of its own."""
    config = parse_config(
        {
            "dtype": "float32",
            "kv_cache_gib": 0.001,
            "block_size": 4,
            "tensor_parallel": {"tp_size": grid.tp_size},
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
        }
    )
    # Each with a config of its own, as in processes.
    models = [make_model(copy.deepcopy(FAMILIES[family])) for _ in range(grid.world_size)]

    def body(topology):
        model = models[topology.rank]
        layers = sliced_projections(model, model_spec(model), topology.tp.size, topology.tp.index)
        if spoil is not None:
            layers = spoil(layers)
        before, modules = storage_bytes(model.parameters()), list(model.modules())
        with sliced(layers, topology.tp, whole):
            assert storage_bytes(model.parameters()) < before
            with cpinfer.attach(model, topology, config) as engine:
                results = engine.generate(prompts_of((3, 40), 128), SamplingParams(temperature=0, max_new_tokens=6))
        after = list(model.modules())
        assert len(modules) == len(after) and all(a is b for a, b in zip(modules, after, strict=True))
        return results

    return run_ranks(grid, body)


def check(family, all_results):
    model = make_model(FAMILIES[family])
    for results in all_results:
        for result in results:
            assert list(result.token_ids) == check_rollout.generate_greedy(model, result.prompt_token_ids, 6)
            scores = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
            assert (scores - torch.tensor(result.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("family", SLICED)
def test_slices_of_two_ranks_give_the_tokens_of_the_whole_model(family):
    check(family, generate(family, RankGrid(tp_size=2)))


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss", "deepseek_v3"])
def test_heads_are_copied_where_ranks_are_more_than_heads(family):
    check(family, generate(family, RankGrid(tp_size=4, dcp_size=2)))


def test_slices_and_pcp_together_give_the_tokens_of_the_whole_model():
    check("qwen3", generate("qwen3", RankGrid(tp_size=2, pcp_size=2, dcp_size=2)))


def test_a_slice_of_the_wrong_rank_is_seen():
    """The control: a rank keeps the other's part of o_proj."""

    def swap(layers):
        for layer in layers:
            for i, projection in enumerate(layer):
                if projection.name == "o_proj":
                    other = slice(32, 64) if projection.parts[0].start == 0 else slice(0, 32)
                    layer[i] = type(projection)(projection.parent, projection.name, (other,), projection.sums)
        return layers

    with pytest.raises(AssertionError):
        check("qwen2", generate("qwen2", RankGrid(tp_size=2), spoil=swap))


def test_a_family_without_projections_of_its_own_is_refused_by_name():
    model = make_model(FAMILIES["gpt_bigcode"])
    with pytest.raises(UnsupportedError, match=r'gpt_bigcode.*"tp_shards"'):
        sliced_projections(model, model_spec(model), 2, 0)


@pytest.mark.parametrize("family", sorted(WITHOUT_TP))
def test_a_family_that_no_tensor_parallelism_cuts_is_refused_with_the_reason(family):
    model = make_model(copy.deepcopy(FAMILIES[family]))
    spec = model_spec(model)
    with pytest.raises(UnsupportedError, match=rf'"{family}" with tp=2 \({spec.why_no_tp}\)'):
        sliced_projections(model, spec, 2, 0)


def test_a_phase_that_fails_puts_the_projections_back():
    model = make_model(FAMILIES["qwen2"])
    modules = list(model.modules())

    def body(topology):
        with (
            pytest.raises(KeyboardInterrupt),
            sliced(sliced_projections(model, model_spec(model), 1, 0), topology.tp, whole),
        ):
            assert list(model.modules()) != modules
            raise KeyboardInterrupt
        return True

    assert run_ranks(RankGrid(), body) == [True]
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
