"""Whatever value stands in a model's files: it is refused by its name before weights load, or nobody reads it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from broken_checkpoints import set_in_json
from cpinfer.engine.attach import attach
from cpinfer.errors import UserError
from cpinfer.models.loading import fresh_model, known_weights, load_model, load_spec
from every_family import EVERY_FAMILY
from tiny_models import FAMILIES, make_model

WRONG = ["13", ["a"], {"a": 1}, True, 1.5, 0, None]
# What neither the engine reads, nor the model in evaluation mode.
UNREAD = {
    "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id",
    "chunk_size_feed_forward", "embd_pdrop", "embedding_dropout", "hidden_dropout", "initializer_range",
    "input_jitter_noise", "label2id", "num_nextn_predict_layers", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "qk_head_dim", "resid_pdrop",
    "residual_dropout", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "transformers_version",
    "use_cache",
}  # fmt: skip
# Values that are of a right kind for some keys: these become another model, or the class's own.
RIGHT: dict[str, list[Any]] = {
    "attention_bias": [True],
    "attention_multiplier": [1.5],
    "attention_out_bias": [True],
    "attn_logit_softcapping": [1.5, None],
    "clip_qkv": [1.5],
    "embedding_multiplier": [1.5],
    "eos_token_id": [0, None],
    "final_logit_softcapping": [1.5, None],
    "first_k_dense_replace": [0],
    "head_dim": [None],
    "id2label": [None],
    "intermediate_size": [None],  # of models of experts alone
    "dtype": [None],
    "is_encoder_decoder": [True, 0, None],
    "layer_norm_eps": [1.5],
    "layer_norm_epsilon": [1.5],
    "layer_types": [None, ["a"]],
    "lm_head_bias": [True],
    "logit_scale": [1.5],
    "logits_scaling": [1.5],
    "max_window_layers": [0],
    "mlp_bias": [True],
    "mlp_only_layers": [None],
    "n_group": [None],
    "n_inner": [None],
    "n_shared_experts": [0],
    "no_rope_layer_interval": [0],
    "no_rope_layers": [None],
    "norm_eps": [1.5],
    "norm_epsilon": [1.5],
    "norm_topk_prob": [True, None],
    "num_experts_per_tok": [None],
    "num_key_value_heads": [None],
    "num_local_experts": [None],
    "q_lora_rank": [None],
    "qk_layernorm": [True],
    "residual_multiplier": [1.5],
    "rms_norm_eps": [1.5],
    "rope_interleave": [None],
    "rope_parameters": [{"a": 1}, None],
    "rotary_dim": [None],
    "routed_scaling_factor": [1.5],
    "sliding_window": [None],
    "sliding_window_pattern": ["13", 0, None],
    "swiglu_alpha": [1.5],
    "swiglu_limit": [1.5],
    "tie_word_embeddings": [True, None],
    "topk_group": [None],
    "topk_method": ["13", None],
    "use_bidirectional_attention": [None, True],
    "use_bias": [True, None],
    "use_qk_norm": [True, None],
    "use_sliding_window": [True],
    "full_attention": [{"a": 1}, None],
    "sliding_attention": [{"a": 1}, None],
    "rope_theta": [1.5],
    "factor": [1.5],
    "original_max_position_embeddings": [1.5],
    "mscale_all_dim": [1.5, 0, None],
}


def changed(config: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every key of a config, and of its RoPE, with a value of each kind; and the config that has it."""
    for value in WRONG:
        for key in config:
            if value != config[key] or type(value) is not type(config[key]):
                yield key, value, {**config, key: value}
        rope = config.get("rope_parameters") or {}
        for key in rope:
            yield key, value, {**config, "rope_parameters": {**rope, key: value}}


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without what Transformers says of such values."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name_or_nobody_reads_it(
    family: str, tmp_path: Path, quiet: None
) -> None:
    whole = json.loads(FAMILIES[family].to_json_string(use_diff=False))
    taken, unnamed = [], []
    for key, value, config in changed(whole):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            load_spec(str(tmp_path))
            known_weights(str(tmp_path), torch.float32, in_files=False)
        except UserError as error:
            if key not in str(error) and value not in RIGHT.get(key, ()):
                unnamed.append((key, value, str(error)))
        else:
            taken.append((key, value))
    assert unnamed == []
    assert [(k, v) for k, v in taken if k not in UNREAD and repr(v) not in map(repr, RIGHT.get(k, ()))] == []


ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}, "rope_parameters": ...},
            '"factor" is "2"; a number above 0',
        ),
        ({"rope_theta": "1e6", "rope_parameters": ...}, '"rope_theta" is "1e6"; a number above 0'),
        ({"rope_parameters": {**ROPE, "factor": -4}}, '"factor" is -4; a number above 0'),
        ({"rope_parameters": {**ROPE, "factor": True}}, '"factor" is true; a number above 0'),
        ({"rope_parameters": {**ROPE, "beta_fast": "32"}}, '"beta_fast" is "32"; a number above 0'),
        ({"rope_parameters": {**ROPE, "mscale": [1]}}, '"mscale" is [1]; a number was wanted'),
        (
            {"rope_parameters": {**ROPE, "rope_type": "yarm"}},
            '"rope_type" is "yarm"; a kind of RoPE (default, dynamic,',
        ),
        ({"torch_dtype": "bf16"}, '"torch_dtype" is "bf16"; the name of a dtype of torch'),
        ({"hidden_act": "swish9"}, '"hidden_act" is "swish9"; the name of an activation'),
        ({"is_encoder_decoder": "false"}, '"is_encoder_decoder" is "false"; true or false'),
        ({"id2label": {"a": "b"}}, '"id2label" is'),
    ],
)
def test_it_is_told_what_was_wanted(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    set_in_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError) as caught:
        load_spec(str(tmp_path))
    assert f"the model's config.json: {told}" in str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        {**ROPE, "attention_factor": None, "mscale": 0, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1},
        {"rope_type": "default", "rope_theta": 500000},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2},
        {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        None,
    ],
)
def test_what_people_have_of_rope_is_taken(rope: Any, tmp_path: Path) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    set_in_json(tmp_path / "config.json", rope_parameters=rope)
    load_spec(str(tmp_path))
    known_weights(str(tmp_path), torch.float32, in_files=False)


# generation_config.json

WRONG_GENERATION: dict[str, list[Any]] = {
    "do_sample": ["true", 1, [True]],
    "temperature": ["0.7", [0.7], True, {"a": 1}],
    "top_p": ["0.9", True],
    "top_k": ["20", 1.5, True],
    "min_p": ["0", [0]],
    "repetition_penalty": ["1.1", True],
    "max_new_tokens": ["100", 1.5, -1, 0, True],
    "min_new_tokens": ["2", 1.5],
    "max_length": ["20", [20]],
    "pad_token_id": ["0", [0], 1.5],
    "bos_token_id": ["1", True],
    "stop_strings": [3, [3], {"a": 1}],
    "suppress_tokens": ["3", 3, ["3"]],
    "watermarking_config": ["x", 3],
    "cache_implementation": ["none_such", 3],
}


@pytest.mark.parametrize("key", WRONG_GENERATION)
def test_so_is_a_value_in_a_generation_config(key: str, tmp_path: Path, quiet: None) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    for value in WRONG_GENERATION[key]:
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}), encoding="utf-8")
        with pytest.raises(UserError, match=rf"generation_config\.json.*{key}"):
            load_spec(str(tmp_path))
    (tmp_path / "generation_config.json").write_text(json.dumps({key: None}), encoding="utf-8")
    load_spec(str(tmp_path))


@pytest.mark.parametrize("content", ["[1]", '"x"', "3", "[" * 10**5])
def test_a_generation_config_that_is_no_object_is_told_in_a_sentence(content: str, tmp_path: Path) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"its generation_config\.json could not be read"):
        load_spec(str(tmp_path))


# Tokens that end an answer: a text of digits would be two tokens, and one beyond the vocabulary never comes.

WRONG_ENDS = ["13", ["13"], [13, "2"], 13.0, [13.0], True, [True], -1, [5, -1], {"a": 1}, 128, [5, 10**6], 10**12]


@pytest.mark.parametrize("ends", WRONG_ENDS, ids=repr)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_that_never_come_are_refused_in_files_and_in_a_model_that_is_loaded(
    ends: Any, file: str, tmp_path: Path, quiet: None
) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}", encoding="utf-8")
    set_in_json(tmp_path / file, eos_token_id=ends)
    with pytest.raises(UserError, match=rf'the model\'s {file}: "eos_token_id" is .* was wanted\.$'):
        load_spec(str(tmp_path))
    model = make_model(copy.deepcopy(FAMILIES["llama"]))
    holder = model.config if file == "config.json" else model.generation_config
    vars(holder)["eos_token_id"] = ends  # past the check that some classes have
    with pytest.raises(UserError, match=r'"eos_token_id" is .* was wanted'), attach(model):
        pytest.fail("the block must not be entered")


def test_those_of_a_config_do_not_matter_where_the_generation_config_has_others(tmp_path: Path, quiet: None) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    set_in_json(tmp_path / "config.json", eos_token_id=32000)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [127, 0]}', encoding="utf-8")
    assert load_spec(str(tmp_path)).eos_token_ids == (127, 0)


# Attention and experts run as the engine has them: what a file asks for may be missing here, or be fetched as code.

KEYS = ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
        "_experts_implementation", "_experts_implementation_internal"]  # fmt: skip
ASKED = ["flash_attention_2", "kernels-community/vllm-flash-attn3", {"": "flash_attention_3"}]


@pytest.mark.parametrize("key", KEYS)
def test_attention_or_experts_that_a_config_asks_for_do_not_matter(key: str, tmp_path: Path) -> None:
    make_model(FAMILIES["mixtral"]).save_pretrained(tmp_path)
    read = (lambda model: load_spec(model), lambda model: known_weights(model, torch.float32))
    whole = [step(str(tmp_path)) for step in read]
    x = torch.tensor([[1, 2, 3]])
    wanted = load_model(str(tmp_path), torch.float32)(x).logits
    for asked in ASKED:
        set_in_json(tmp_path / "config.json", **{key: asked})
        assert [step(str(tmp_path)) for step in read] == whole
        assert torch.equal(load_model(str(tmp_path), torch.float32)(x).logits, wanted)
        assert fresh_model(str(tmp_path), torch.float32)(x).logits.shape == wanted.shape


def test_so_do_forms_of_output(tmp_path: Path) -> None:
    make_model(FAMILIES["llama"]).save_pretrained(tmp_path)
    with attach(load_model(str(tmp_path), torch.float32)) as engine:
        wanted = engine.generate([[1, 2, 3]])[0].token_ids
    set_in_json(tmp_path / "config.json", return_dict=False, output_attentions=True, output_hidden_states=True)
    with attach(load_model(str(tmp_path), torch.float32)) as engine:
        assert engine.generate([[1, 2, 3]])[0].token_ids == wanted
