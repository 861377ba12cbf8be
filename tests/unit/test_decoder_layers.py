"""Which modules are the decoder layers and their attention, and which layers cannot be run one after another."""

import copy

import pytest
from torch import nn

from cpinfer.engine.attach import attach, model_spec
from cpinfer.errors import UserError
from cpinfer.models.decoder_layers import attention_modules, check_layers, decoder_layers
from tiny_models import FAMILIES, make_model


def fresh(family="llama"):
    return make_model(copy.deepcopy(FAMILIES[family]))


def layers_of(model):
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_and_attention_of_every_family_are_found_and_in_order(family):
    model = fresh(family)
    assert decoder_layers(model) == layers_of(model)
    for layer in decoder_layers(model):
        [attention] = attention_modules(layer)
        assert attention in [getattr(layer, name, None) for name in ("attn", "self_attn", "linear_attn")]
    check_layers(model, model_spec(model).windows)


def test_other_lists_as_long_are_passed_over():
    """Heads of somebody's own stand in front of the decoder."""
    model = fresh()
    decoder, head = model._modules.pop("model"), model._modules.pop("lm_head")
    model.heads = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model.model, model.lm_head = decoder, head
    assert decoder_layers(model) == layers_of(model)


def test_layers_beyond_those_of_the_config_are_not_run():
    model = fresh()
    model.config.num_hidden_layers = 1
    assert decoder_layers(model) == layers_of(model)[:1]


def dropped(model):
    del model.model.layers[1]


def first_dropped(model):
    del model.model.layers[0]
    model.config.num_hidden_layers = 1


def used_twice(model):
    model.model.layers[1] = model.model.layers[0]


def miscounted(model):
    model.model.layers[1].self_attn.layer_idx = 0


def swapped(model):
    first, second = model.model.layers
    model.model.layers[0], model.model.layers[1] = second, first


def without_attention(model):
    model.model.layers[1].self_attn = nn.Identity()


@pytest.mark.parametrize(
    "change, words",
    [
        (dropped, "LlamaForCausalLM has no list of 2 decoder layers with attention"),
        (without_attention, "LlamaForCausalLM has no list of 2 decoder layers with attention"),
        (first_dropped, r"layers.0.self_attn runs as layer 0 and has layer_idx 1"),
        (used_twice, r"layers.0.self_attn runs as layer 1 and has layer_idx 0"),
        (miscounted, r"layers.1.self_attn runs as layer 1 and has layer_idx 0"),
        (swapped, r"layers.0.self_attn runs as layer 0 and has layer_idx 1"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_layers_that_do_not_count_themselves_in_order_are_refused_before_anything_is_changed(change, words):
    change(model := fresh())
    before = {module: dict(vars(module)) for module in model.modules()}
    with pytest.raises(UserError, match=words), attach(model):
        pytest.fail("the block must not be entered")
    assert {module: dict(vars(module)) for module in model.modules()} == before


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_windows_that_were_changed_in_the_config_alone_are_refused(family):
    model = fresh(family)
    model.config.sliding_window = 16
    with (
        pytest.raises(UserError, match=r"self_attn was made with sliding_window 24; the model's config says 16"),
        attach(model),
    ):
        pytest.fail("the block must not be entered")
