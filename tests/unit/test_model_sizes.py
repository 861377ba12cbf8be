"""What the cost of steps depends on, of every family, against the models themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.model_sizes import model_sizes
from cpinfer.models.spec import ModelSpec
from every_family import EVERY_FAMILY
from tiny_models import FAMILIES


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_token_passes_all_matrices_but_those_of_experts_that_are_not_its_own(family):
    config = copy.deepcopy(FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = ModelSpec.from_config(config.to_dict())
    sizes = model_sizes(spec, model)
    matrices = sum(w.numel() for layer in decoder_layers(model) for w in layer.parameters() if w.ndim > 1)
    assert sizes.layer_params + sizes.num_experts * sizes.expert_params == matrices
    assert (sizes.num_experts > 0) == (spec.experts_per_token is not None)
    assert len(sizes.windows) == spec.num_kv_layers
    if sizes.num_experts:
        named = ("num_experts", "num_local_experts", "n_routed_experts")
        assert sizes.num_experts in [getattr(config, name, None) for name in named]
        assert sizes.active_params < matrices
    else:
        assert sizes.active_params == matrices


def test_the_matrices_that_expand_a_latent_are_kv_b_proj():
    config = copy.deepcopy(FAMILIES["deepseek_v3"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = model_sizes(ModelSpec.from_config(config.to_dict()), model)
    assert sizes.expand_params == sum(w.numel() for name, w in model.named_parameters() if "kv_b_proj" in name)
    assert sizes.expanded_head == (24, 12)
