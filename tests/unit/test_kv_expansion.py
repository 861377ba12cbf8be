"""Expanded K/V heads: the model computes what it computed, and any tensor parallelism can deal the heads evenly."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cpinfer.models.kv_expansion import expand_kv_heads
from cpinfer.models.spec import NUM_KV_HEADS_BEFORE_EXPANSION, ModelSpec
from tiny_models import FAMILIES as TINY_MODELS
from tiny_models import make_model as make_tiny_model

Q_HEADS, KV_HEADS, HEAD_DIM = 8, 2, 8
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": Q_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama with bias": LlamaConfig(**SHAPE, attention_bias=True),
    "qwen2": Qwen2Config(**SHAPE),  # biases on q, k and v
    "qwen3": Qwen3Config(**SHAPE),  # norms on q and k heads
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
}


def make_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # every parameter must tell: fresh biases are zero
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(std=0.5)
            elif parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def logits_of(model):
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [4, 8])
def test_an_expanded_model_computes_what_it_computed(family, tp_size):
    model = make_model(family)
    want = logits_of(model)
    expand_kv_heads(model, tp_size)
    torch.testing.assert_close(logits_of(model), want, atol=1e-6, rtol=0)
    assert float(want.std()) > 0.1  # and it was not a model of nothing


def test_heads_in_another_order_would_be_seen():
    """The control: copies side by side (0 1 0 1) instead of head by head (0 0 1 1) is another model."""
    model = make_model("qwen2")
    want = logits_of(model)
    expand_kv_heads(model, 4)
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.data.view(4, HEAD_DIM, -1)
            projection.weight.data = heads[[0, 2, 1, 3]].reshape_as(projection.weight)
    assert float((logits_of(model) - want).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_head_j_is_a_copy_of_head_j_over_rep(family):
    model = make_model(family)
    before = copy.deepcopy(model)
    expand_kv_heads(model, 8)
    for old, new in zip(before.model.layers, model.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            a, b = getattr(old.self_attn, name), getattr(new.self_attn, name)
            assert b.weight.shape == (8 * HEAD_DIM, 32) and b.out_features == 8 * HEAD_DIM
            assert (a.bias is None) == (b.bias is None)
            for j in range(8):
                wide, narrow = (slice(h * HEAD_DIM, (h + 1) * HEAD_DIM) for h in (j, j // 4))
                assert torch.equal(b.weight[wide], a.weight[narrow])
                assert b.bias is None or torch.equal(b.bias[wide], a.bias[narrow])


def test_config_and_modules_say_how_many_heads_there_are_now_and_were():
    model = make_model("qwen2")
    expand_kv_heads(model, 4)
    assert model.config.num_key_value_heads == 4
    assert getattr(model.config, NUM_KV_HEADS_BEFORE_EXPANSION) == KV_HEADS
    assert {layer.self_attn.num_key_value_groups for layer in model.model.layers} == {2}
    assert ModelSpec.from_config(model.config.to_dict()).num_kv_heads == KV_HEADS


@pytest.mark.parametrize("tp_size", [1, 2])
def test_nothing_happens_while_every_rank_has_a_head_of_its_own(tp_size):
    model = make_model("qwen2")
    parameters = dict(model.named_parameters())
    config = model.config.to_dict()
    expand_kv_heads(model, tp_size)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_latent_is_one_head_that_every_rank_computes_whole_so_nothing_happens(family, num_kv_heads):
    config = copy.deepcopy(TINY_MODELS[family])
    config.num_key_value_heads = num_kv_heads  # of no meaning for a latent, and configs have any number there
    model = make_tiny_model(config)
    parameters, config = dict(model.named_parameters()), model.config.to_dict()
    expand_kv_heads(model, 8)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_of_gpt_bigcode_only_the_number_of_heads_that_its_config_names_grows(tp_size):
    """AutoTP deals heads by that number; the fused projection with its one KV head stays whole."""
    model = make_tiny_model(TINY_MODELS["gpt_bigcode"])
    parameters, config = dict(model.named_parameters()), model.config.to_dict()
    for _ in range(2):  # a second call changes nothing more
        expand_kv_heads(model, tp_size)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert model.config.to_dict() == {**config, "num_key_value_heads": tp_size}
        assert ModelSpec.from_config(model.config.to_dict()).num_kv_heads == 1


def test_gpt_bigcode_over_ranks_that_its_heads_do_not_fit_is_refused():
    model = make_tiny_model(TINY_MODELS["gpt_bigcode"])
    with pytest.raises(ValueError, match="do not divide"):
        expand_kv_heads(model, 3)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text", "mixtral"])
def test_families_with_windows_sinks_and_experts_compute_what_they_computed(family):
    model = make_tiny_model(copy.deepcopy(TINY_MODELS[family]))
    want = logits_of(model)
    expand_kv_heads(model, 8)
    torch.testing.assert_close(logits_of(model), want, atol=1e-5 * float(want.std()), rtol=0)


def test_only_k_and_v_are_touched():
    model = make_model("qwen2")
    before = dict(model.named_parameters())
    expand_kv_heads(model, 4)
    changed = {name for name, parameter in model.named_parameters() if parameter is not before[name]}
    assert changed and all(".k_proj." in name or ".v_proj." in name for name in changed)


def test_parameters_stay_trainable_or_frozen_as_they_were():
    model = make_model("qwen2")
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    expand_kv_heads(model, 4)
    first, second = model.model.layers
    assert not first.self_attn.k_proj.weight.requires_grad and not first.self_attn.k_proj.bias.requires_grad
    assert second.self_attn.k_proj.weight.requires_grad and first.self_attn.v_proj.weight.requires_grad
    assert all(parameter.is_leaf for parameter in model.parameters())


def test_dtype_is_kept():
    model = make_model("qwen2").bfloat16()
    expand_kv_heads(model, 8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tp_size", [3, 16])
def test_heads_that_cannot_be_dealt_are_refused_and_nothing_is_changed(tp_size):
    model = make_model("qwen2")
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="do not"):
        expand_kv_heads(model, tp_size)
    assert model.config.to_dict() == before


def test_expanding_again_leaves_the_same_model():
    """A second call finds the heads that tp_size needs; copies of copies would be another model."""
    model = make_model("qwen2")
    want = logits_of(model)
    expand_kv_heads(model, 4)
    expand_kv_heads(model, 4)
    assert model.model.layers[0].self_attn.k_proj.out_features == 4 * HEAD_DIM
    torch.testing.assert_close(logits_of(model), want, atol=1e-6, rtol=0)
