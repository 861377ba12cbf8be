"""Heads of linear attention under tensor parallelism: which are a rank's, and what is no cut between heads."""

import copy

import pytest
import torch
from torch import nn

from cpinfer.engine.attach import model_spec
from cpinfer.errors import UserError
from cpinfer.layout.capacity import StateLayout
from cpinfer.models.gated_delta_net import LinearHeads
from cpinfer.models.kv_expansion import expand_kv_heads
from cpinfer.models.linear_cuts import SplitLinear, WholeLinear, heads_in_use
from tiny_models import FAMILIES, make_model

# Two key heads of 2, six value heads of 5.
LAYOUT = StateLayout(num_layers=1, num_k_heads=2, num_v_heads=6, k_dim=2, v_dim=5, conv_width=4)
HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
TOKENS = torch.arange(20)[None]


def model_of(family):
    return make_model(copy.deepcopy(FAMILIES[family]))


def linear_attention(model):
    return model.model.layers[0].linear_attn


def cut(linear, dim, rank, of=2):
    """A `nn.Linear` with one rank's even part of the rows (or columns)."""
    part = nn.Linear(1, 1, bias=False)
    part.weight = nn.Parameter(linear.weight.detach().chunk(of, dim)[rank])
    return part


def cut_as_autotp_does(model, rank):
    """Every `nn.Linear` of linear attention by rows, `out_proj` by columns."""
    for parent in [m for m in linear_attention(model).modules() if not isinstance(m, nn.Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, cut(child, int(name == "out_proj"), rank))
    return model


def test_a_rank_has_its_queries_keys_and_values_among_those_of_all():
    heads = LinearHeads.of(LAYOUT, tp_size=2, tp_rank=1)
    assert (heads.own.num_k_heads, heads.own.num_v_heads) == (1, 3)
    assert heads.channels == (slice(2, 4), slice(6, 8), slice(23, 38)) and heads.v_heads == slice(3, 6)
    weight = torch.arange(38)[:, None]
    assert heads.of_channels(weight).flatten().tolist() == [2, 3, 6, 7, *range(23, 38)]
    assert heads.of_values(torch.arange(6)).tolist() == [3, 4, 5]


@pytest.mark.parametrize("tp_size", [1, 4])
def test_heads_that_do_not_divide_are_all_on_every_rank(tp_size):
    assert LAYOUT.over(tp_size) == LAYOUT
    whole = LinearHeads.of(LAYOUT)
    weight = torch.arange(38)
    assert whole.own == LAYOUT and whole.of_channels(weight) is weight


def test_what_a_rank_keeps_of_a_sequence_is_its_share():
    assert 2 * LAYOUT.over(2).bytes_per_sequence("float32") == LAYOUT.bytes_per_sequence("float32")


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("family", HYBRIDS)
def test_projections_made_ready_to_be_cut_compute_what_they_did(family, tp_size):
    model = model_of(family)
    with torch.no_grad():
        before = model(TOKENS).logits
        expand_kv_heads(model, tp_size)
        expand_kv_heads(model, tp_size)  # a second call finds nothing to do
        assert (model(TOKENS).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("family", HYBRIDS)
def test_no_even_cut_is_left_that_goes_through_heads(family):
    divided, whole = model_of(family), model_of(family)
    expand_kv_heads(divided, 2)
    expand_kv_heads(whole, 4)
    fused = linear_attention(divided)._modules.get("in_proj_qkv")
    assert fused is None or isinstance(fused, SplitLinear)
    assert not any(isinstance(child, nn.Linear) for child in linear_attention(whole).children())
    for model in (divided, whole):
        narrow = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features < 2]
        assert not narrow, "some rank would have no row of it"


def test_of_a_shared_expert_narrower_than_tp_either_all_is_cut_or_nothing():
    config = copy.deepcopy(FAMILIES["qwen3_next"])
    config.shared_expert_intermediate_size = 3
    model = make_model(config)
    expand_kv_heads(model, 4)
    for layer in model.model.layers:
        cuttable = {
            isinstance(child, nn.Linear) for child in layer.mlp.shared_expert.children() if list(child.parameters())
        }
        assert cuttable == {True}, "rows of what is whole would meet columns of what is cut"
        assert isinstance(layer.mlp.shared_expert_gate, WholeLinear)


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_cut_between_heads_is_known_by_what_out_proj_takes(family, rank):
    whole = model_of(family)
    states = model_spec(whole).states
    assert heads_in_use(whole, states, 2, rank) == LinearHeads.of(states)
    expand_kv_heads(whole, 2)
    assert heads_in_use(cut_as_autotp_does(whole, rank), states, 2, rank) == LinearHeads.of(states, 2, rank)


def test_a_projection_that_was_cut_where_the_rows_of_all_heads_end_is_refused():
    model = cut_as_autotp_does(model_of("qwen3_5_text"), 0)
    with pytest.raises(UserError, match=r"linear_attn\.in_proj_qkv was cut over tp=2 .* Call expand_kv_heads before"):
        heads_in_use(model, model_spec(model).states, 2, 0)


def test_layers_must_agree_and_take_whole_heads():
    config = copy.deepcopy(FAMILIES["qwen3_next"])
    config.layer_types, config.num_hidden_layers = [*config.layer_types, "linear_attention"], 3
    model = cut_as_autotp_does(make_model(config), 0)
    with pytest.raises(
        UserError, match=r"layers\.2\.linear_attn\.out_proj takes 48 values .* all 48, or in every layer"
    ):
        heads_in_use(model, model_spec(model).states, 2, 0)
    other = model_of("qwen3_next")
    linear_attention(other).out_proj = cut(linear_attention(other).out_proj, 1, 0, of=4)
    with pytest.raises(UserError, match="out_proj takes 12 values on this rank; with 4 value heads of 12"):
        heads_in_use(other, model_spec(other).states, 2, 0)


def test_a_whole_linear_layer_is_none_that_autotp_knows():
    linear = nn.Linear(3, 1)
    whole, x = WholeLinear(linear), torch.randn(2, 3)
    assert torch.equal(whole(x), linear(x)) and whole.weight is linear.weight
    assert not isinstance(whole, nn.Linear)
