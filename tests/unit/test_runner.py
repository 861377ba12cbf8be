"""The hook between Transformers and a step: what a layer says of itself arrives, heads are checked before anything."""

import types

import pytest
import torch

from cpinfer.attention.layer import AttentionLayer
from cpinfer.engine.attach import model_spec
from cpinfer.errors import UserError
from cpinfer.models.runner import RankStep, attached, attend_by_step
from tiny_models import FAMILIES, make_model

T, H, K, D = 3, 4, 2, 8
MODULE = types.SimpleNamespace(layer_idx=5)


class Recording:
    """A step that keeps what it is given and answers with the queries."""

    num_tokens = T

    def __init__(self):
        self.given = []

    def attend(self, layer, q, k, v):
        self.given.append((layer, q, k, v))
        return q


def attend(step, q_heads=range(H), **words):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, T, D, generator=g) for heads in (H, K, K))
    cp_step = None if step is None else RankStep(step, q_heads)
    out, weights = attend_by_step(MODULE, q, k, v, None, scaling=0.25, cp_step=cp_step, **words)
    assert weights is None
    return out, (q, k, v)


def test_a_layer_arrives_with_all_that_its_module_says_of_it():
    step, sinks = Recording(), torch.randn(H)
    attend(step, sliding_window=7, softcap=30.0, s_aux=sinks, dropout=0.0, is_causal=True)
    [(layer, *_)] = step.given
    assert (layer.index, layer.scale, layer.soft_cap, layer.window) == (5, 0.25, 30.0, 7)
    assert layer.sinks is sinks
    attend(step)
    assert step.given[-1][0] == AttentionLayer(5, 0.25)


def test_tokens_come_first_in_a_step_and_second_in_transformers():
    step = Recording()
    out, (q, k, v) = attend(step)
    [(_, *got)] = step.given
    for x, y in zip(got, (q, k, v), strict=True):
        assert torch.equal(x, y[0].transpose(0, 1))
    assert torch.equal(out, q.transpose(1, 2))


@pytest.mark.parametrize("tp_rank", [0, 1, 2])
def test_of_the_sinks_of_all_heads_a_rank_takes_those_of_its_own(tp_rank):
    """AutoTP shards projections and leaves sinks whole."""
    step, sinks = Recording(), torch.arange(3.0 * H)
    attend(step, range(tp_rank * H, (tp_rank + 1) * H), s_aux=sinks)
    assert step.given[0][0].sinks.tolist() == list(range(tp_rank * H, (tp_rank + 1) * H))


def test_sinks_that_are_sharded_already_are_taken_as_they_are():
    """As Transformers' tensor parallelism has them: this rank's heads, whatever their numbers in the model."""
    step, sinks = Recording(), torch.randn(H)
    attend(step, range(H, 2 * H), s_aux=sinks)
    assert step.given[0][0].sinks is sinks


def test_a_model_run_without_a_step_is_told_so():
    with pytest.raises(RuntimeError, match="attached to a cpinfer engine, which alone may run it"):
        attend(None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_has_the_heads_of_one_rank_and_not_those_of_two(family):
    model = make_model(FAMILIES[family])
    with attached(model, model_spec(model), tp_size=1):
        pass
    with (
        pytest.raises(UserError, match=r"rows on this rank.* over tp=2 it should have"),
        attached(model, model_spec(model), tp_size=2),
    ):
        pytest.fail("the block must not be entered")


class Adapted(torch.nn.Module):
    """A projection as adapters wrap it: `weight` is the base's, the call adds to it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.delta = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.delta(x)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_an_adapter_that_decode_on_latents_would_pass_over_is_refused(family):
    model = make_model(FAMILIES[family])
    attention = model.model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    with attached(model, model_spec(model), tp_size=1):
        pass  # one that is called may stay
    attention.kv_b_proj = Adapted(attention.kv_b_proj)
    with (
        pytest.raises(UserError, match=r"layers\.1\.self_attn\.kv_b_proj is a Adapted.*Merge the adapter"),
        attached(model, model_spec(model), tp_size=1),
    ):
        pass
