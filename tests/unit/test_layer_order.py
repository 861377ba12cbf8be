"""A step for one forward, which wants every layer once, in order, with the window that the config says."""

import types

import pytest
import torch

from cpinfer.attention.layer import AttentionLayer
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
