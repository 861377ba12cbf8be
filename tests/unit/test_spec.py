"""What a model is, read from the configs of transformers' own classes; what cannot run is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cpinfer.errors import UnsupportedError, UserError
from cpinfer.layout.capacity import KVLayout, StateLayout
from cpinfer.models.families import FAMILIES, RECURRENT
from cpinfer.models.positions import Positions
from cpinfer.models.spec import NUM_KV_HEADS_BEFORE_EXPANSION, LatentDims, ModelSpec

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
OLD_SHAPE = {"vocab_size": 100, "n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 8, "n_positions": 512}
LATENT = {"kv_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12, "v_head_dim": 6}
ROUTED = {"num_experts_per_tok": 4, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
STATES = {"linear_layers": (0, 2), "states": StateLayout(2, 2, 6, 8, 10, 4)}
# Of a family what a config of SHAPE lacks to be one that people have, and what its spec then has that Llama's has not.
OWN = {
    "mistral": ({"sliding_window": None}, {}),
    "mixtral": ({"num_experts_per_tok": 2}, {"mlp_size": 2 * 96}),
    "qwen3_moe": (ROUTED, {"mlp_size": 4 * 32}),
    "gemma2": ({"sliding_window": 128}, {"windows": (128, None, 128), "has_soft_cap": True}),
    "gemma3_text": ({"sliding_window": 128}, {"windows": (128, 128, 128)}),
    "gpt_oss": (
        {"sliding_window": 128, "num_experts_per_tok": 4, "rope_parameters": YARN},
        {"mlp_size": 4 * 96, "windows": (128, None, 128)},
    ),
    "deepseek_v2": (
        {**ROUTED, **LATENT, "n_shared_experts": 2},
        {"num_kv_heads": 1, "head_dim": 16, "mlp_size": 6 * 32, "latent": LatentDims(24, 4, 12, 6)},
    ),
    "deepseek_v3": (
        {**ROUTED, **LATENT, "n_shared_experts": 1},
        {"num_kv_heads": 1, "head_dim": 16, "mlp_size": 5 * 32, "latent": LatentDims(24, 4, 12, 6)},
    ),
    "gpt_bigcode": ({"bos_token_id": 0}, {"num_kv_heads": 1, "head_dim": 8, "positions": Positions(512, "table")}),
    "cohere": ({"use_qk_norm": True}, {"norms_all_heads": True}),
    "cohere2": ({"sliding_window": 128}, {"windows": (128, 128, 128)}),
    "exaone4": ({"sliding_window": 128, "sliding_window_pattern": 2}, {"windows": (128, None, 128)}),
    "glm4_moe": ({**ROUTED, "n_shared_experts": 1}, {"mlp_size": 5 * 32}),
    "granitemoe": ({"num_experts_per_tok": 2}, {"mlp_size": 2 * 96}),
    "minimax_m2": ({"num_experts_per_tok": 2}, {"mlp_size": 2 * 96}),
    "olmo3": ({"sliding_window": 128}, {"windows": (128, 128, 128)}),
    "olmoe": ({"num_experts_per_tok": 2, "num_experts": 4}, {"mlp_size": 2 * 96}),
    "phi3": ({"sliding_window": 128}, {"windows": (128,) * 3}),
    "phimoe": ({"num_experts_per_tok": 2, "sliding_window": 128}, {"mlp_size": 2 * 96, "windows": (128,) * 3}),
    "stablelm": ({"qk_layernorm": True}, {"norms_all_heads": True}),
    "starcoder2": ({"sliding_window": 128}, {"windows": (128,) * 3}),
    "qwen3_next": (
        {**ROUTED, **HYBRID, "shared_expert_intermediate_size": 8},
        {**STATES, "mlp_size": 4 * 32 + 8},
    ),
    "qwen3_5_text": (HYBRID, STATES),
    "qwen3_5_moe_text": (
        {**ROUTED, **HYBRID, "shared_expert_intermediate_size": 8},
        {**STATES, "mlp_size": 4 * 32 + 8},
    ),
    "olmo_hybrid": (HYBRID, STATES),
    "kimi_linear": (
        {
            **ROUTED,
            **LATENT,
            "n_shared_experts": 1,
            "bos_token_id": 0,
            "layer_types": HYBRID["layer_types"],
            "linear_num_heads": 4,
            "linear_head_dim": 12,
            "linear_conv_kernel_dim": 3,
        },
        {
            "num_kv_heads": 1,
            "head_dim": 16,
            "mlp_size": 5 * 32,
            "latent": LatentDims(24, 4, 12, 6),
            "linear_layers": (0, 2),
            "states": StateLayout(2, 4, 4, 12, 12, 3),
        },
    ),
}


def make(name, **changes):
    """The config of a class of transformers as plain data."""
    return getattr(transformers, name)(**changes).to_dict()


def config_of(family, **changes):
    shape = OLD_SHAPE if family == "gpt_bigcode" else SHAPE
    plain = {**shape, "eos_token_id": None, "pad_token_id": None}  # some classes have those of larger vocabularies
    return transformers.AutoConfig.for_model(family, **{**plain, **OWN.get(family, ({}, {}))[0], **changes})


def supported(family, **changes):
    return config_of(family, **changes).to_dict()


def test_what_is_told_here_of_families_is_told_of_those_supported():
    assert set(OWN) <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_supported_config_is_read_whole(family):
    """Families name a head_dim, or have hidden_size / num_attention_heads, or parts of it."""
    head_dim = {} if "head_dim" in OWN.get(family, ({}, {}))[1] else {"head_dim": 16}
    spec = ModelSpec.from_config(supported(family, **head_dim, eos_token_id=7))
    llama = {
        "num_layers": 3,
        "num_q_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "mlp_size": 96,
        "vocab_size": 100,
        "max_positions": 512,
        "eos_token_ids": (7,),
        "windows": (None,) * 3,
        "positions": Positions(512),
        "latent": None,
        "experts_per_token": OWN.get(family, ({}, {}))[0].get("num_experts_per_tok"),
    }
    assert spec == ModelSpec(**{"family": family, **llama, **OWN.get(family, ({}, {}))[1]})


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


@pytest.mark.parametrize("multi_query, heads", [(True, 1), (False, 8)])
def test_gpt_bigcode_has_one_kv_head_or_as_many_as_query_heads(multi_query, heads):
    assert ModelSpec.from_config(supported("gpt_bigcode", multi_query=multi_query)).num_kv_heads == heads


def test_an_mlp_without_a_width_of_its_own_is_four_times_as_wide_as_the_model():
    assert ModelSpec.from_config(supported("gpt_bigcode", n_inner=None)).mlp_size == 4 * 64


@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_a_rank_caches_keys_and_values_of_the_heads_it_stores(num_heads):
    assert ModelSpec.from_config(supported("llama")).kv_layout(num_heads) == KVLayout(num_heads, 8, 8)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_latent_cache_holds_one_vector_of_which_the_values_are_the_beginning(family):
    spec = ModelSpec.from_config(supported(family))
    layout = spec.kv_layout(1)
    assert layout == KVLayout(1, 24 + 4, 24, v_is_prefix_of_k=True)
    assert layout.values_per_token == 28
    assert [spec.heads(tp).kv_heads_per_rank for tp in (1, 2, 8)] == [1, 1, 1], "the same on every rank"


@pytest.mark.parametrize(
    "family, width",
    [
        ("mixtral", 2 * 96),
        ("gpt_oss", 4 * 96),
        ("qwen3_moe", 4 * 32),
        ("deepseek_v2", (4 + 2) * 32),
        ("deepseek_v3", (4 + 1) * 32),
    ],
)
def test_a_token_passes_its_own_experts_and_the_shared_ones(family, width):
    assert ModelSpec.from_config(supported(family)).mlp_size == width
    one_fewer = ModelSpec.from_config(supported(family, num_experts_per_tok=OWN[family][0]["num_experts_per_tok"] - 1))
    one = 96 if family in ("mixtral", "gpt_oss") else 32
    assert one_fewer.mlp_size == width - one


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
        ("GPT2Config", "model families without a row"),
        ("Qwen2MoeConfig", "model families without a row"),
        ("Glm4MoeLiteConfig", "model families without a row"),
        ("Llama4TextConfig", "model families without a row"),
        ("MambaConfig", "recurrent and hybrid models"),
        ("JambaConfig", "(with layers of Mamba): cpinfer does not support recurrent and hybrid models"),
        ("T5Config", "encoder-decoder models"),
        ("BartConfig", "encoder-decoder models"),
        ("LlavaConfig", "multimodal models"),
        ("Gemma3Config", "multimodal models"),
        ("Qwen2VLConfig", "multimodal models"),
        ("Qwen2AudioConfig", "multimodal models"),
    ],
)
def test_other_models_are_refused_by_name(config, what):
    data = make(config)
    with pytest.raises(UnsupportedError) as caught:
        ModelSpec.from_config(data)
    assert f'model_type "{data["model_type"]}"' in str(caught.value) and what in str(caught.value)


LAST_SEES_ALL = ["sliding_attention", "sliding_attention", "full_attention"]
WINDOWED = [
    # family, what its config says, the window of every layer
    ("mistral", {"sliding_window": 4096}, (4096,) * 3),
    ("mistral", {"sliding_window": None}, (None,) * 3),
    ("mixtral", {"sliding_window": 64}, (64,) * 3),
    ("qwen3_moe", {"sliding_window": 64, "use_sliding_window": True}, (64,) * 3),
    ("qwen3_moe", {"sliding_window": 64, "use_sliding_window": False}, (None,) * 3),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}, (None, 128, 128)),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}, (None, None, 128)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3}, (None,) * 3),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 128}, (None,) * 3),
    ("gemma2", {"sliding_window": 32}, (32, None, 32)),
    ("gpt_oss", {"sliding_window": 32, "layer_types": ["full_attention"] * 3}, (None,) * 3),
    ("exaone4", {"sliding_window": 32, "sliding_window_pattern": 3}, (32, 32, None)),
    ("cohere2", {"sliding_window": 32, "layer_types": LAST_SEES_ALL}, (32, 32, None)),
    ("olmo3", {"sliding_window": 32, "layer_types": LAST_SEES_ALL}, (32, 32, None)),
    ("smollm3", {"sliding_window": 32, "use_sliding_window": True, "layer_types": LAST_SEES_ALL}, (32, 32, None)),
    ("smollm3", {"sliding_window": None, "use_sliding_window": False}, (None,) * 3),
    ("phi3", {"sliding_window": 32}, (32,) * 3),
    ("phimoe", {"sliding_window": 32}, (32,) * 3),
    ("starcoder2", {"sliding_window": 32}, (32,) * 3),
    ("starcoder2", {"sliding_window": None}, (None,) * 3),
]


@pytest.mark.parametrize("family, changes, windows", WINDOWED, ids=lambda x: x if isinstance(x, str) else "")
def test_every_layer_has_the_window_that_its_family_gives_it(family, changes, windows):
    assert ModelSpec.from_config(supported(family, **changes)).windows == windows


def test_gemma_3_has_a_layer_that_sees_all_after_five_with_a_window():
    spec = ModelSpec.from_config(supported("gemma3_text", num_hidden_layers=8))
    assert spec.windows == (128, 128, 128, 128, 128, None, 128, 128)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert ModelSpec.from_config(supported("gemma3_text", layer_types=kinds)).windows == (None, 128, None)


@pytest.mark.parametrize(
    "family, changes",
    [(family, changes) for family, changes, _ in WINDOWED if changes.get("sliding_window") is not None]
    + [("gemma3_text", {"num_hidden_layers": 8})],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_windows_are_those_that_the_models_own_attention_modules_have(family, changes):
    """The control of the table above: what Transformers passes to its attention function, layer by layer."""
    config = config_of(family, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = ModelSpec.from_config(config.to_dict())
    attention = [layer.self_attn for layer in model.model.layers]
    # Mistral's and Mixtral's modules ask their config at every call, EXAONE's has the config's window on every layer.
    own = [
        getattr(a, "sliding_window", getattr(a.config, "sliding_window", None))
        if getattr(a, "is_sliding", True)
        else None
        for a in attention
    ]
    assert spec.windows == tuple(own)


def test_a_mistral_window_counts_whatever_its_layers_are_called():
    data = {**supported("mistral", sliding_window=128), "layer_types": ["full_attention"] * 3}
    assert ModelSpec.from_config(data).windows == (128,) * 3


@pytest.mark.parametrize(
    "windows, widest", [((None,), None), ((4, None), None), ((4, 9, 4), 9), ((3,), 3), ((None, None), None)]
)
def test_the_widest_window_is_none_as_soon_as_one_layer_sees_all(windows, widest):
    spec = replace(ModelSpec.from_config(supported("llama")), windows=windows)
    assert spec.widest_window == widest


def test_bidirectional_attention_is_refused():
    data = supported("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match=r'"gemma3_text".*bidirectional attention'):
        ModelSpec.from_config(data)


def test_layers_of_other_kinds_are_refused_and_named():
    data = {**supported("qwen3"), "layer_types": ["full_attention", "chunked_attention", "sliding_attention"]}
    with pytest.raises(UnsupportedError, match="layers of chunked_attention"):
        ModelSpec.from_config(data)
    with pytest.raises(UnsupportedError, match="recurrent and hybrid"):
        ModelSpec.from_config({**data, "layer_types": ["linear_attention"]})


def test_a_family_by_another_name_is_told_its_own():
    """Its files come with code, which would be said first otherwise."""
    data = {**supported("deepseek_v3"), "model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Config"}}
    with pytest.raises(UnsupportedError, match=r'"kimi_k2", which is "deepseek_v3",.*Set model_type in its config'):
        ModelSpec.from_config(data)
    ModelSpec.from_config({**data, "model_type": "deepseek_v3"})


def test_a_config_that_names_no_model_is_no_hugging_face_model():
    with pytest.raises(UserError, match='no "model_type"'):
        ModelSpec.from_config({"hidden_size": 3})


def test_rope_that_depends_on_the_length_of_a_step_is_refused():
    """longrope picks its frequencies by the largest position in the forward: every rank of a prefill has another one,
    and so has every step. (`dynamic` only changes beyond max_positions, where no prompt comes: test_positions.)"""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UnsupportedError, match="longrope"):
        ModelSpec.from_config({**supported("llama"), "rope_parameters": rope})
    ModelSpec.from_config({**supported("llama"), "rope_parameters": {**rope, "rope_type": "dynamic"}})


def test_the_shipped_model_is_read_from_its_files():
    folder = Path(__file__).parents[2] / "configs" / "recall-tiny"
    data, generation = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "generation_config.json")
    )
    spec = ModelSpec.from_config(data, generation)
    assert (spec.family, spec.num_q_heads, spec.num_kv_heads, spec.head_dim) == ("qwen2", 8, 2, 32)
    assert (spec.max_positions, spec.eos_token_ids) == (32768, (26,))


def test_deepseek_absorbs_up_to_170_queries():
    """512 * 256 multiplications to expand a latent, 1,088 against 320 for each query of it."""
    assert LatentDims(512, 64, 128, 128).max_absorbed_queries == 170
    assert LatentDims(8, 4, 12, 6).max_absorbed_queries is None, "a latent as small as what it expands to"


def test_layers_of_linear_attention_cache_no_keys():
    spec = ModelSpec.from_config(supported("qwen3_next"))
    assert (spec.num_layers, spec.num_kv_layers, spec.widest_window) == (3, 1, None)
    assert ModelSpec.from_config(supported("qwen3_next", layer_types=["full_attention"] * 3)).states is None
    assert ModelSpec.from_config(supported("llama")).num_kv_layers == 3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer_types": ["linear_attention"] * 3}, "at least one full_attention was wanted"),
        ({"linear_num_value_heads": 5}, r'"linear_num_value_heads" is 5; a multiple of linear_num_key_heads \(2\)'),
        ({"linear_conv_kernel_dim": 0}, '"linear_conv_kernel_dim" is 0; a whole number from 1'),
        ({"layer_types": ["linear_attention", "mamba", "full_attention"]}, "recurrent and hybrid models"),
    ],
)
def test_sizes_of_states_that_no_model_has_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        ModelSpec.from_config({**supported("qwen3_next"), **change})


def test_positions_may_be_untold_where_the_family_has_that_alone():
    """As the released models of it have it: `rope_theta` is null, and its code rotates nothing."""
    rope = {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    assert ModelSpec.from_config({**supported("olmo_hybrid"), **rope}).positions == Positions(512)
    with pytest.raises(UserError, match='"rope_theta" is null; a number above 0 was wanted'):
        ModelSpec.from_config({**supported("olmo2"), **rope})


def test_a_size_is_named_as_the_config_has_it_where_it_is_wrong():
    with pytest.raises(UserError, match='"linear_num_heads" is 0; a whole number from 1'):
        ModelSpec.from_config({**supported("kimi_linear"), "linear_num_heads": 0})
    with pytest.raises(UserError, match='"num_experts_per_token" is "two"; a whole number from 1'):
        ModelSpec.from_config({**supported("kimi_linear"), "num_experts_per_token": "two"})


def test_what_one_family_calls_its_positions_is_no_size_of_another():
    assert ModelSpec.from_config({**supported("llama"), "model_max_length": 1e30}).max_positions == 512


@pytest.mark.parametrize("family", RECURRENT)
def test_families_with_other_states_are_refused_by_their_name_alone(family):
    words = rf'"{family}" \(with layers of {RECURRENT[family]}\): cpinfer does not support recurrent and hybrid models'
    with pytest.raises(UnsupportedError, match=words):
        ModelSpec.from_config({"model_type": family})


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in FAMILIES])
def test_every_other_causal_lm_of_transformers_is_refused_by_name_and_one_with_states_as_such(family):
    """Those that keep states say so in their class; what has vision or sound beside is refused for that."""
    with pytest.raises(UnsupportedError, match=f'model_type "{family}"') as caught:
        ModelSpec.from_config({"model_type": family})
    is_text = not transformers.CONFIG_MAPPING[family].sub_configs
    if is_text and getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])._is_stateful:
        assert "recurrent and hybrid models" in str(caught.value)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_models_with_a_vision_part_are_refused_by_name(family):
    with pytest.raises(UnsupportedError, match="multimodal models"):
        ModelSpec.from_config(transformers.AutoConfig.for_model(family).to_dict())
