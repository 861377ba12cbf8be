"""Where experts are called, what goes to them is seen; what cannot be seen is told before anything runs."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import cpinfer
from cpinfer.errors import EngineFaultError, UserError
from cpinfer.models.routed_experts import ExpertLayers
from tiny_models import FAMILIES, make_model, prompts_of

IN_ALL_LAYERS = (
    *("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "minimax_m2", "olmoe", "phimoe"),
    *("qwen3_next", "qwen3_5_moe_text"),
)
IN_THE_LAST_LAYER = ("deepseek_v2", "deepseek_v3", "glm4_moe", "kimi_linear")
LAYERS = {family: [0, 1] for family in IN_ALL_LAYERS} | {family: [1] for family in IN_THE_LAST_LAYER}
IDS = torch.tensor(prompts_of((7,), vocab_size=128))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_with_experts_are_found_in_every_family(family):
    layers = ExpertLayers.of(make_model(FAMILIES[family]))
    assert list(layers.experts) == LAYERS.get(family, [])
    assert layers.unseen == (None if family in LAYERS else "a model without a layer of experts")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_what_is_seen_does_not_depend_on_how_experts_compute_and_leaves_nothing_behind(implementation):
    model = make_model(copy.deepcopy(FAMILIES["qwen3_moe"]))
    model.set_experts_implementation(implementation)
    layers, chosen = ExpertLayers.of(model), []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda *hooked: chosen.append(hooked[-1][2]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), layers.watched() as watched:
        model(IDS)
    assert torch.equal(watched.rows(7, 2), torch.stack(chosen, dim=1).to(torch.int16))
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())


def test_adapters_of_experts_are_looked_through():
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(make_model(copy.deepcopy(FAMILIES["mixtral"])), config)
    layers = ExpertLayers.of(model.base_model.model)
    assert layers.unseen is None
    with torch.no_grad(), layers.watched() as watched:
        model(IDS)
    assert watched.rows(7, 2).shape == (7, 2, 2)


def test_experts_that_are_a_list_are_named():
    model = make_model(FAMILIES["mixtral"])
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(64, 64)])
    assert ExpertLayers.of(model).unseen == "layer 1 with experts in a ModuleList"


def test_what_was_not_seen_or_seen_otherwise_is_a_fault_with_its_layer():
    model = make_model(FAMILIES["mixtral"])
    layers = ExpertLayers.of(model)
    with layers.watched() as watched:
        pass
    with pytest.raises(EngineFaultError, match=r"layer 0 called its experts with numbers of shape None; \(7, 2\)"):
        watched.rows(7, 2)
    assert watched.rows(0, 2).shape == (0, 2, 2)
    with torch.no_grad(), layers.watched() as watched:
        model(IDS)
        with pytest.raises(EngineFaultError, match=r"layer 0, a MixtralExperts, were called twice"):
            model(IDS)
    with pytest.raises(EngineFaultError, match=r"numbers of shape \(7, 2\); \(7, 3\) was wanted"):
        watched.rows(7, 3)
    experts = model.model.layers[0].mlp.experts
    with layers.watched(), pytest.raises(EngineFaultError, match="without the numbers of experts"):
        experts(torch.zeros(1, 64))


@pytest.mark.parametrize("call", ["generate", "add", "turn", "generate_pooled", "own"])
def test_a_model_without_experts_is_not_asked_for_them(call):
    asked = cpinfer.SamplingParams(routed_experts=True)
    with cpinfer.attach(make_model(FAMILIES["llama"]), kv_cache_gib=0.001) as engine:
        calls = {
            "generate": lambda: engine.generate([1, 2], asked),
            "add": lambda: engine.add([1, 2], asked),
            "turn": lambda: engine.add([], asked, session=engine.open_session([1, 2])),
            "generate_pooled": lambda: engine.generate_pooled([[1, 2]], asked),
            "own": lambda: engine.generate({"prompt_token_ids": [1, 2], "sampling": {"routed_experts": True}}),
        }
        with pytest.raises(UserError, match=r'"routed_experts" asks .* model_type "llama" has none'):
            calls[call]()
