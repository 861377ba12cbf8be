"""Samples of weights: another checkpoint, seed or step is seen; a checksum of everything sees any element."""

import copy

import pytest
import torch
from torch import nn

from cpinfer.models.weight_samples import config_identity, software_versions, weight_identity
from tiny_models import FAMILIES, make_model


@pytest.fixture(scope="module")
def model():
    return make_model(FAMILIES["qwen2"])


def changed(model, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("full", [False, True])
def test_a_copy_is_the_same_and_every_changed_tensor_is_seen(model, full):
    same = weight_identity(model, full=full)
    assert weight_identity(copy.deepcopy(model), full=full) == same
    for name in tensors_of(model):
        other = changed(model, lambda m, name=name: tensors_of(m)[name].mul_(1.001))
        found = weight_identity(other, full=full)
        assert {key for key in same if found[key] != same[key]} == {f"weight {name}"}


def test_dtypes_and_shapes_are_told(model):
    [(name, one)] = [(n, v) for n, v in weight_identity(model).items() if n == "weight model.norm.weight"]
    assert (one["dtype"], one["shape"]) == ("float32", (64,)), name


def test_a_model_that_one_rank_has_saved_is_still_the_same(tmp_path):
    """As trainers do: the config then has the name of its class, on the rank that has saved it."""
    saved, other = (make_model(copy.deepcopy(FAMILIES["qwen2"])) for _ in range(2))
    saved.config.architectures = other.config.architectures = None  # other tests may have saved one of these
    saved.save_pretrained(tmp_path)
    assert saved.config.to_dict() != other.config.to_dict(), "nothing was written"
    assert config_identity(saved) == config_identity(other)
    other.config.rms_norm_eps *= 2
    assert config_identity(saved) != config_identity(other)


def test_one_element_anywhere_is_seen_by_the_checksum_alone():
    linear = nn.Linear(300, 300)
    same, sampled = weight_identity(linear, full=True), weight_identity(linear)
    unseen = 0
    for row, column in ((0, 0), (17, 3), (299, 299), (150, 149)):
        with torch.no_grad():
            kept = linear.weight[row, column].clone()
            linear.weight[row, column] += 1e-6
        assert weight_identity(linear, full=True) != same
        unseen += weight_identity(linear) == sampled
        with torch.no_grad():
            linear.weight[row, column] = kept
    assert weight_identity(linear, full=True) == same
    assert unseen > 0, "the samples would have to read everything"


def test_exchanged_elements_and_chunks_are_seen_by_the_checksum(monkeypatch):
    monkeypatch.setattr("cpinfer.models.weight_samples._CHUNK", 7)
    linear = nn.Linear(10, 5, bias=False)
    same = weight_identity(linear, full=True)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.flip(0))
    assert weight_identity(linear, full=True) != same


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_every_dtype_and_shape_is_read(dtype):
    module = nn.Module()
    for i, shape in enumerate(((), (1,), (0, 3), (4, 5), (2, 3, 4))):
        module.register_buffer(f"b{i}", torch.ones(shape).to(dtype))
    module.register_buffer("strided", torch.ones(6, 4).to(dtype).t())
    for full in (False, True):
        assert weight_identity(copy.deepcopy(module), full=full) == weight_identity(module, full=full)


def test_what_has_no_values_yet_is_compared_by_shape():
    with torch.device("meta"):
        linear = nn.Linear(4, 3)
    assert weight_identity(linear)["weight weight"] == {"dtype": "float32", "shape": (3, 4), "values": b""}


def test_versions_of_what_computes_are_compared():
    assert {"cpinfer", "torch", "transformers"} <= software_versions().keys()
