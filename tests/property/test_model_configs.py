"""Configs of every family with values of any kind put in: a valid spec or a UserError, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cpinfer.errors import UserError
from cpinfer.models.spec import ModelSpec
from tiny_models import FAMILIES

CONFIGS = {family: config.to_dict() for family, config in FAMILIES.items()}
# Also those that a family has under no name of its own.
KEYS = sorted({key for config in CONFIGS.values() for key in config} | {"kv_lora_rank", "rope_scaling"})
WHOLE = st.one_of(
    st.integers(-3, 130), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**4000]), st.integers()
)
SCALARS = st.one_of(st.none(), st.booleans(), WHOLE, st.floats(), st.text(max_size=8), st.just("sliding_attention"))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROPE_KEYS = [
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "mscale", "low_freq_factor", "full_attention", "sliding_attention",
]  # fmt: skip
ABSENT = object()
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(ABSENT), min_size=1, max_size=3)


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=30, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES, ends=VALUES, rope=st.dictionaries(st.sampled_from(ROPE_KEYS), VALUES, max_size=3))
@example(changes={"num_hidden_layers": 0}, ends=None, rope={})
@example(changes={"num_attention_heads": 0, "n_head": 0}, ends=None, rope={})
@example(changes={"num_hidden_layers": True, "n_layer": True}, ends=None, rope={})
@example(changes={"layer_types": [["full_attention"]]}, ends=None, rope={})
@example(changes={"rope_parameters": [1]}, ends=None, rope={})
@example(changes={"kv_lora_rank": None}, ends=None, rope={})
@example(changes={}, ends="</s>", rope={})
@example(changes={}, ends=[3, 10**6], rope={})
@example(changes={}, ends=None, rope={"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 4096})
@example(changes={}, ends=None, rope={"rope_type": "yarn", "factor": True, "original_max_position_embeddings": "4096"})
def test_a_config_is_a_valid_spec_or_a_user_error(
    family: str, changes: dict[str, Any], ends: Any, rope: dict[str, Any]
) -> None:
    config = {k: v for k, v in {**CONFIGS[family], **changes}.items() if v is not ABSENT}
    if rope and isinstance(config.get("rope_parameters"), dict):
        config["rope_parameters"] = {**config["rope_parameters"], **rope}
    try:
        spec = ModelSpec.from_config(config, {"eos_token_id": ends})
    except UserError as error:
        assert str(error).endswith(".") and len(str(error)) < 1000
        return
    assert_valid(spec)


def assert_valid(spec: ModelSpec) -> None:
    sizes = (spec.num_layers, spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.hidden_size, spec.mlp_size)
    for size in (*sizes, spec.vocab_size, spec.max_positions):
        assert type(size) is int and size >= 1
    assert spec.num_q_heads % spec.num_kv_heads == 0
    assert len(spec.windows) == spec.num_layers
    assert all(window is None or (type(window) is int and window >= 1) for window in spec.windows)
    assert all(type(token) is int and 0 <= token < spec.vocab_size for token in spec.eos_token_ids)
    assert spec.heads(1).tp_size == 1
    assert spec.kv_layout(1).values_per_token >= 1
    assert spec.pairs_per_token >= 1
    assert spec.widest_window is None or spec.widest_window >= 1
