"""Models that are not as `from_pretrained` makes them answer as Transformers says they do, token for token."""

import copy

import pytest
import torch
from thread_tp import on_ranks
from torch import nn
from torch.nn.utils import parametrize

from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.engine.attach import attach
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from every_family import EVERY_FAMILY
from tiny_models import FAMILIES, make_model, prompts_of

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
CONFIG = EngineConfig(dtype="float32", kv_cache_gib=0.001)
PROMPTS = prompts_of((3, 40), vocab_size=128)


def fresh(family):
    return make_model(copy.deepcopy(FAMILIES[family]))


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def attention_of(layer):
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


def check_exact(reference, results):
    for result in results:
        assert list(result.token_ids) == check_rollout.generate_greedy(reference, result.prompt_token_ids, 8)
        scores = check_rollout.score(reference, result.prompt_token_ids, result.token_ids)
        assert (scores - torch.tensor(result.logprobs)).abs().max() < 1e-4


def check(model, reference):
    with attach(model, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    check_exact(reference, results)


# --- modules that hold another config object than the model ---


def config_of_its_own(model):
    model.config = copy.deepcopy(model.config)


def a_copied_layer(model):
    layers_of(model)[1] = copy.deepcopy(layers_of(model)[1])


def the_first_layer_copied(model):
    layers_of(model)[0] = copy.deepcopy(layers_of(model)[0])


def a_config_for_each_layer(model):
    for layer in layers_of(model):
        attention_of(layer).config = copy.deepcopy(model.config)


CHANGES = [config_of_its_own, a_copied_layer, the_first_layer_copied, a_config_for_each_layer]


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("change", CHANGES[:2], ids=lambda change: change.__name__)
def test_every_layer_attends_by_the_engine_whichever_config_object_it_holds(family, change):
    model = fresh(family)
    change(model)
    check(model, fresh(family))


@pytest.mark.parametrize("change", CHANGES[2:], ids=lambda change: change.__name__)
def test_so_does_every_rank(change):
    model = fresh("gemma2")
    change(model)
    for results in on_ranks(model, RankGrid(pcp_size=2, dcp_size=2), lambda engine: engine.generate(PROMPTS, GREEDY)):
        check_exact(fresh("gemma2"), results)


def test_a_config_under_another_name_is_found_as_well():
    """Some code keeps `config` as a property of something else."""
    model = fresh("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        settings = copy.deepcopy(vars(attention).pop("config"))
        attention.__class__ = type("Renamed", (type(attention),), {"config": property(lambda self: self.settings)})
        attention.settings = settings
    check(model, fresh("llama"))


class Wrapped(nn.Module):
    """Attention inside a module of somebody's own, which hands on what it is given."""

    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_attention_may_be_wrapped(family):
    model = fresh(family)
    for layer in model.model.layers:
        layer.self_attn = Wrapped(layer.self_attn)
    check(model, fresh(family))


def test_a_config_that_counts_fewer_layers_runs_fewer():
    """As Transformers does."""
    model, reference = fresh("llama"), fresh("llama")
    model.config.num_hidden_layers = reference.config.num_hidden_layers = 1
    check(model, reference)


# --- hooks, and weights that are computed ---


def test_hooks_on_any_module_have_their_say():
    model = fresh("llama")
    model.model.layers[0].register_forward_hook(lambda module, given, out: out * 1.1)
    model.lm_head.register_forward_hook(lambda module, given, out: out * 0.5)

    def turn_round(module, given, out):
        out.logits = -out.logits
        return out

    model.register_forward_hook(turn_round)
    check(model, model)
    with_hooks, without = (check_rollout.generate_greedy(of, PROMPTS[0], 8) for of in (model, fresh("llama")))
    assert with_hooks != without, "hooks that say nothing would prove nothing"


def test_parametrized_projections_are_used_as_they_come_out():
    class Larger(nn.Module):
        def forward(self, weight):
            return weight * 1.5

    model = fresh("llama")
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.self_attn.q_proj, "weight", Larger())
    check(model, model)


# --- what torch.compile makes of models and their modules ---


def refuse_to_compile(graph, examples):
    pytest.fail("nothing is compiled for the engine")


def compiled(module):
    return torch.compile(module, backend=refuse_to_compile)


def whole(model):
    return compiled(model)


def in_place(model):
    model.compile(backend=refuse_to_compile)
    return model


def its_decoder(model):
    model.model = compiled(model.model)
    return model


def its_layers(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


def its_layers_in_place(model):
    for layer in model.model.layers:
        layer.compile(backend=refuse_to_compile)
    return model


def its_attention(model):
    for layer in model.model.layers:
        layer.self_attn.forward = compiled(layer.self_attn.forward)
    return model


@pytest.mark.parametrize(
    "change, family",
    [
        (whole, "llama"),
        (whole, "gpt_bigcode"),
        (in_place, "gemma2"),
        (its_decoder, "llama"),
        (its_layers, "deepseek_v2"),
        (its_layers, "mixtral"),
        (its_layers_in_place, "deepseek_v3"),
        (its_attention, "qwen2"),
    ],
)
def test_compiled_modules_run_as_they_are_written_and_are_what_they_were_afterwards(change, family):
    model = change(fresh(family))
    before = {module: dict(vars(module)) for module in model.modules()}
    check(model, fresh(family))
    assert {module: dict(vars(module)) for module in model.modules()} == before


# --- value heads ---


class ValueHead(nn.Module):
    """As RL libraries have it."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.config = model, model.config
        self.v_head = nn.Linear(model.config.hidden_size, 1)

    def forward(self, **given):
        out = self.pretrained_model(**given, output_hidden_states=True)
        return out.logits, None, self.v_head(out.hidden_states[-1])


@pytest.mark.parametrize("wrap", [ValueHead, nn.DataParallel, lambda model: compiled(ValueHead(model))])
def test_the_causal_lm_inside_a_wrapper_is_the_one_that_answers(wrap):
    model = wrap(fresh("llama")).train()
    check(model, fresh("llama"))
    assert all(module.training for module in model.modules())
