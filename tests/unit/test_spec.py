"""What a model is, read from the configs of transformers' own classes; what cannot run is refused by name."""

import json
from pathlib import Path

import pytest
import transformers

from cpinfer.errors import UnsupportedError, UserError
from cpinfer.layout.capacity import KVLayout
from cpinfer.models.spec import NUM_KV_HEADS_BEFORE_EXPANSION, SUPPORTED_FAMILIES, ModelSpec

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}


def make(name, **changes):
    """The config of a class of transformers as plain data."""
    return getattr(transformers, name)(**changes).to_dict()


def supported(family, **changes):
    extra = {"sliding_window": None} if family == "mistral" else {}
    return make(CLASSES[family], **{**SHAPE, **extra, **changes})


def test_the_families_here_are_those_supported():
    assert set(CLASSES) == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("family", CLASSES)
def test_a_supported_config_is_read_whole(family):
    spec = ModelSpec.from_config(supported(family, head_dim=16, eos_token_id=7))
    assert spec == ModelSpec(
        family=family,
        num_layers=3,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=96,
        vocab_size=100,
        max_positions=512,
        eos_token_ids=(7,),
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_the_head_dim_follows_from_the_hidden_size_where_none_is_named(family):
    assert ModelSpec.from_config(supported(family)).head_dim == 8


def test_heads_without_a_number_of_their_own_are_query_heads():
    data = supported("llama", num_key_value_heads=8)
    data["num_key_value_heads"] = None
    assert ModelSpec.from_config(data).num_kv_heads == 8


def test_expanded_heads_count_as_the_models_own():
    data = {**supported("qwen2", num_key_value_heads=8), NUM_KV_HEADS_BEFORE_EXPANSION: 2}
    assert ModelSpec.from_config(data).num_kv_heads == 2


@pytest.mark.parametrize("tp_size, heads", [(1, 2), (2, 1), (4, 1), (8, 1)])
def test_a_rank_caches_its_own_kv_heads(tp_size, heads):
    assert ModelSpec.from_config(supported("llama")).kv_layout(tp_size) == KVLayout(heads, 8, 8)


def test_pairs_per_token_are_a_layers_parameters_over_the_cost_of_a_pair():
    spec = ModelSpec.from_config(supported("llama"))
    parameters = 64 * 8 * (8 + 8 + 2 + 2) + 3 * 64 * 96
    assert spec.pairs_per_token == parameters // (2 * 8 * 8)


@pytest.mark.parametrize(
    "generation, config, want",
    [
        (None, 7, (7,)),
        (None, [7, 9], (7, 9)),
        (None, None, ()),
        ({}, 7, (7,)),
        ({"eos_token_id": None}, 7, (7,)),
        ({"eos_token_id": 5}, 7, (5,)),
        ({"eos_token_id": [5, 6]}, 7, (5, 6)),
        ({"eos_token_id": 0}, 7, (0,)),
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(generation, config, want):
    data = supported("llama")
    data["eos_token_id"] = config
    assert ModelSpec.from_config(data, generation).eos_token_ids == want


@pytest.mark.parametrize(
    "config, what",
    [
        ("Gemma2Config", "model families other than"),
        ("MixtralConfig", "model families other than"),
        ("DeepseekV3Config", "model families other than"),
        ("GptOssConfig", "model families other than"),
        ("GPT2Config", "model families other than"),
        ("Qwen2MoeConfig", "model families other than"),
        ("MambaConfig", "recurrent and hybrid models"),
        ("Qwen3NextConfig", "recurrent and hybrid models"),
        ("JambaConfig", "recurrent and hybrid models"),
        ("T5Config", "encoder-decoder models"),
        ("BartConfig", "encoder-decoder models"),
        ("LlavaConfig", "multimodal models"),
        ("Qwen2VLConfig", "multimodal models"),
        ("Qwen2AudioConfig", "multimodal models"),
    ],
)
def test_other_models_are_refused_by_name(config, what):
    data = make(config)
    with pytest.raises(UnsupportedError) as caught:
        ModelSpec.from_config(data)
    assert f'model_type "{data["model_type"]}"' in str(caught.value) and what in str(caught.value)


WINDOWED = [
    ("MistralConfig", {"sliding_window": 4096}),
    ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}),
    ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}),
]


@pytest.mark.parametrize("config, changes", WINDOWED, ids=lambda x: x if isinstance(x, str) else "")
def test_sliding_windows_are_refused(config, changes):
    with pytest.raises(UnsupportedError, match="sliding-window attention"):
        ModelSpec.from_config(make(config, **SHAPE, **changes))


def test_a_mistral_window_counts_whatever_its_layers_are_called():
    data = make("MistralConfig", **SHAPE, sliding_window=128)
    with pytest.raises(UnsupportedError, match="sliding-window attention"):
        ModelSpec.from_config({**data, "layer_types": ["full_attention"] * 3})


@pytest.mark.parametrize("config", ["Qwen2Config", "Qwen3Config"])
def test_a_window_that_no_layer_uses_is_none(config):
    ModelSpec.from_config(make(config, **SHAPE, sliding_window=128, use_sliding_window=False))
    ModelSpec.from_config(make(config, **SHAPE, sliding_window=128, use_sliding_window=True, max_window_layers=3))


def test_quantized_weights_are_refused():
    with pytest.raises(UnsupportedError, match=r'"llama".*quantized weights.*bfloat16'):
        ModelSpec.from_config({**supported("llama"), "quantization_config": {"quant_method": "awq", "bits": 4}})


def test_a_config_that_names_no_model_is_no_hugging_face_model():
    with pytest.raises(UserError, match='no "model_type"'):
        ModelSpec.from_config({"hidden_size": 3})


def test_rope_that_depends_on_the_length_of_a_step_is_refused():
    """longrope picks its frequencies by the largest position in the forward: every rank of a prefill has another one,
    and so has every step. (`dynamic` only changes beyond max_positions, where no prompt can come.)"""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UnsupportedError, match="longrope"):
        ModelSpec.from_config({**supported("llama"), "rope_parameters": rope})


def test_the_shipped_model_is_read_from_its_files():
    folder = Path(__file__).parents[2] / "configs" / "recall-tiny"
    data, generation = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "generation_config.json")
    )
    spec = ModelSpec.from_config(data, generation)
    assert (spec.family, spec.num_q_heads, spec.num_kv_heads, spec.head_dim) == ("qwen2", 8, 2, 32)
    assert (spec.max_positions, spec.eos_token_ids) == (32768, (26,))
