"""A step for one forward, which wants every layer once, in order, with the window that the config says."""

import types

import pytest
import torch

from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.linear_attention import LinearLayer
from cpinfer.errors import EngineFaultError
from cpinfer.models.layer_order import EveryLayerOnce

WINDOWS = (None, 8, None)
LAYERS = [AttentionLayer(index, 1.0, window=window) for index, window in enumerate(WINDOWS)]
X = torch.zeros(1, 1, 1)


def run(*layers):
    seen = []
    step = types.SimpleNamespace(num_tokens=1, attend=lambda layer, q, k, v: seen.append(layer) or q)
    checked = EveryLayerOnce(step, WINDOWS)
    assert checked.num_tokens == 1
    try:
        for layer in layers:
            assert checked.attend(layer, X, X, X) is X
        checked.check_complete()
    finally:
        assert seen == list(layers)[: len(seen)]
    return seen


def test_layers_in_order_reach_the_step():
    assert run(*LAYERS) == LAYERS


@pytest.mark.parametrize(
    "layers, words",
    [
        ((), "in 0 of its 3 layers. Layer 0 has"),
        (LAYERS[:2], "in 2 of its 3 layers. Layer 2 has"),
        ((LAYERS[0], LAYERS[2]), "layer 2 was called after 1 of 3 layers. Layer 1 has"),
        ((LAYERS[1],), "layer 1 was called after 0 of 3 layers. Layer 0 has"),
        ((LAYERS[0], LAYERS[0]), "layer 0 was called after 1 of 3 layers. Layers share a layer_idx"),
        ((*LAYERS, LAYERS[2]), "layer 2 was called after 3 of 3 layers. Layers share"),
        ((*LAYERS, AttentionLayer(3, 1.0)), "layer 3 was called after 3 of 3 layers"),
        ((LAYERS[0], AttentionLayer(1, 1.0)), "layer 1 attends with a window of None; the model's config says 8"),
        ((AttentionLayer(0, 1.0, window=4),), "layer 0 attends with a window of 4; the model's config says None"),
    ],
)
def test_any_other_order_or_window_is_a_fault_before_that_layer_is_computed(layers, words):
    with pytest.raises(EngineFaultError, match=words):
        run(*layers)


class Linear:
    """A step of linear attention that notes which layers convolve and recur."""

    num_tokens = 1

    def __init__(self, seen):
        self.seen = seen

    def convolve(self, layer, x):
        self.seen.append(("convolve", layer.index))
        return x

    def recur(self, layer, tokens):
        self.seen.append(("recur", layer.index))
        return tokens


LINEAR = [LinearLayer(index, None, None, None) for index in range(3)]


def run_hybrid(*layers):
    """Layers 0 and 2 are of linear attention; where each kind of layer came, and the places in the cache."""
    seen = []
    step = types.SimpleNamespace(num_tokens=1, attend=lambda layer, q, k, v: seen.append(("attend", layer.index)) or q)
    checked = EveryLayerOnce(step, (None,) * 3, Linear(seen), (0, 2))
    for layer in layers:
        if isinstance(layer, LinearLayer):
            assert checked.convolve(layer, X) is X
            checked.recur(layer, X)
        else:
            checked.attend(layer, X, X, X)
    checked.check_complete()
    return seen


def test_layers_of_linear_attention_have_no_place_in_the_kv_cache_and_others_are_counted_without_them():
    found = run_hybrid(LINEAR[0], AttentionLayer(1, 1.0), LINEAR[2])
    assert found == [("convolve", 0), ("recur", 0), ("attend", 0), ("convolve", 2), ("recur", 2)]


@pytest.mark.parametrize(
    "layers, words",
    [
        ((LINEAR[0], AttentionLayer(1, 1.0)), "in 2 of its 3 layers. Layer 2 has"),
        ((AttentionLayer(1, 1.0),), "layer 1 was called after 0 of 3 layers. Layer 0 has"),
        ((LINEAR[0], LINEAR[0]), "layer 0 was called after 1 of 3 layers. Layers share a layer_idx"),
        ((LINEAR[0], LINEAR[1]), "is one of linear attention, and softmax attention by the model's config"),
        ((AttentionLayer(0, 1.0),), "is one of softmax attention, and linear attention by the model's config"),
    ],
)
def test_a_layer_of_either_kind_that_is_passed_over_or_is_of_the_other_is_a_fault(layers, words):
    with pytest.raises(EngineFaultError, match=words):
        run_hybrid(*layers)
