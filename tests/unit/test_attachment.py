"""An attached model has one engine, is nobody else's to change, and gets back every object that it had."""

import copy
import re
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from cpinfer.comm.threads import run_ranks
from cpinfer.config import EngineConfig, JobConfig, SamplingParams
from cpinfer.engine.attach import attach
from cpinfer.errors import EngineFaultError, ModelChangedError, RanksDifferError, UserError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model

CONFIG = EngineConfig(kv_cache_gib=0.001, block_size=4)
GREEDY = SamplingParams(temperature=0, max_new_tokens=3)
PROMPT = [1, 2, 3, 4, 5]


def fresh(family="llama"):
    return make_model(copy.deepcopy(FAMILIES[family]))


def objects_of(model):
    """Every attribute of every module, as the object that it is."""
    return {
        module: {
            key: value if isinstance(value, (bool, int, str)) else id(value) for key, value in vars(module).items()
        }
        for module in model.modules()
    }


def implementations(model):
    configs = [value for module in model.modules() for value in vars(module).values()]
    return {id(c): c._attn_implementation for c in configs if isinstance(c, PretrainedConfig)}


# --- configs ---


def test_every_config_object_gets_a_copy_and_comes_back_as_it_was():
    model, other = fresh(), fresh()
    own = model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    own._attn_implementation = "eager"
    other.model.layers[0].self_attn.config = own  # another model may hold the same object
    before, chosen = objects_of(model), implementations(model)
    with attach(model, config=CONFIG):
        inside = implementations(model)
        assert set(inside.values()) == {"cpinfer"} and len(inside) == len(chosen) == 2
        assert not inside.keys() & chosen.keys()
        assert own._attn_implementation == "eager" and other.model.layers[0].self_attn.config is own
    assert objects_of(model) == before and implementations(model) == chosen


# --- one engine ---


def with_shared_layers(model):
    other = fresh()
    other.model.layers = model.model.layers
    return other


def with_shared_embedding(model):
    """Whose mode would be lost if the first block ended first."""
    other = fresh()
    other.model.embed_tokens = model.model.embed_tokens
    return other


@pytest.mark.parametrize(
    "family, again",
    [
        ("llama", lambda model: model),
        ("mixtral", lambda model: model),
        ("deepseek_v2", lambda model: model),
        ("llama", lambda model: nn.DataParallel(model)),
        ("llama", with_shared_layers),
        ("llama", with_shared_embedding),
        ("mixtral", copy.deepcopy),
    ],
    ids=["a model", "experts", "latents", "wrapped", "shared layers", "shared embedding", "a copy"],
)
def test_what_is_attached_is_refused_to_a_second_engine_before_anything_is_changed(family, again):
    model = fresh(family).train()
    outside = objects_of(model)
    with attach(model, config=CONFIG) as engine:
        first = engine.generate([PROMPT], GREEDY)
        second = again(model)
        before = objects_of(second)
        with (
            pytest.raises(UserError, match=r"is attached to an engine already.* one engine at a time"),
            attach(second, config=CONFIG),
        ):
            pytest.fail("the block must not be entered")
        assert objects_of(second) == before
        assert [r.token_ids for r in engine.generate([PROMPT], GREEDY)] == [r.token_ids for r in first]
    assert objects_of(model) == outside


def test_blocks_of_models_that_share_weights_and_no_modules_may_end_in_any_order():
    model = fresh().train()
    beside = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    before = [objects_of(model), objects_of(beside)]
    first, second = ExitStack(), ExitStack()
    one = first.enter_context(attach(model, config=CONFIG))
    two = second.enter_context(attach(beside, config=CONFIG))
    assert [r.token_ids for r in one.generate([PROMPT], GREEDY)] == [
        r.token_ids for r in two.generate([PROMPT], GREEDY)
    ]
    first.close()
    second.close()
    assert [objects_of(model), objects_of(beside)] == before


# --- changes inside the block ---


def to_bfloat16(model):
    model.to(torch.bfloat16)


def one_projection_to_bfloat16(model):
    model.model.layers[1].self_attn.k_proj.to(torch.bfloat16)


def to_another_device(model):
    model.lm_head.to("meta")


def another_config(model):
    model.model.layers[0].self_attn.config = copy.deepcopy(model.model.layers[0].self_attn.config)


def another_implementation(model):
    model.set_attn_implementation("sdpa")


def training_mode(model):
    model.model.layers[0].train()


def another_layer(model):
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def another_module(model):
    model.model.layers[0].self_attn.q_proj.extra = nn.Dropout(0.5)


def a_layer_less(model):
    del model.model.layers[1]


CHANGED = {
    to_bfloat16: r"model.embed_tokens.weight was torch.float32 on cpu and became torch.bfloat16 on cpu",
    one_projection_to_bfloat16: r"layers.1.self_attn.k_proj.weight was torch.float32 on cpu and became torch.bfloat16",
    to_another_device: r"lm_head.weight was torch.float32 on cpu and became torch.float32 on meta",
    another_config: r"the config or the attention implementation of a LlamaAttention was replaced",
    another_implementation: r"the attention implementation of a LlamaForCausalLM was replaced",
    training_mode: r"model.layers.0 was put into training mode",
    another_layer: r"modules in model.layers were added, replaced or removed",
    another_module: r"modules in model.layers.0.self_attn.q_proj were added",
    a_layer_less: r"modules in model.layers were added, replaced or removed",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_model_that_is_changed_while_attached_stops_the_next_call_by_name(change):
    with attach(model := fresh(), config=CONFIG) as engine:
        engine.generate([PROMPT], GREEDY)
        change(model)
        for call in (lambda: engine.generate([PROMPT], GREEDY), lambda: engine.score([(PROMPT, (1,))])):
            with pytest.raises(ModelChangedError, match=CHANGED[change] + r".* Leave the `with cpinfer"):
                call()


def test_a_change_that_is_taken_back_is_none():
    with attach(model := fresh(), config=CONFIG) as engine:
        before = engine.generate([PROMPT], GREEDY)
        model.train()
        with pytest.raises(ModelChangedError):
            engine.generate([PROMPT], GREEDY)
        model.eval()
        assert [r.token_ids for r in engine.generate([PROMPT], GREEDY)] == [r.token_ids for r in before]


def test_modules_that_do_not_leave_training_mode_are_let_be():
    class Always(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def train(self, mode=True):
            return self

        def forward(self, x):
            return self.inner(x)

    model = fresh()
    model.model.layers[0].mlp = Always(model.model.layers[0].mlp)
    with attach(model, config=CONFIG) as engine:
        engine.generate([PROMPT], GREEDY)


def test_a_change_on_one_rank_stops_all():
    models = [fresh() for _ in range(2)]

    def body(topology):
        with attach(models[topology.rank], topology, JobConfig(prefill_context_parallel_size=2)) as engine:
            engine.generate([PROMPT], GREEDY)
            if topology.rank == 1:
                models[1].train()
            with pytest.raises((ModelChangedError, RanksDifferError)) as raised:
                engine.generate([PROMPT], GREEDY)
        return type(raised.value).__name__, str(raised.value)

    told, own = run_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    assert own[0] == "ModelChangedError" and told[0] == "RanksDifferError" and "put into training mode" in told[1]


# --- layers that the engine does not get ---


def a_forward_of_its_own(layer):
    """Attention of a token to itself, as somebody's fast path might have it."""
    attention = layer.self_attn

    def forward(hidden_states, **_):
        values = attention.v_proj(hidden_states).view(*hidden_states.shape[:2], 2, -1).repeat_interleave(4, dim=2)
        return attention.o_proj(values.flatten(2)), None

    attention.forward = forward


def a_config_of_its_class(layer):
    config = copy.deepcopy(vars(layer.self_attn).pop("config"))
    layer.self_attn.__class__ = type("Fixed", (type(layer.self_attn),), {"config": config})


def run_twice(layer):
    inner = layer.self_attn.forward

    def forward(**given):
        inner(**given)
        return inner(**given)

    layer.self_attn.forward = forward


FAULTS = {
    (a_forward_of_its_own, 1): r"in 1 of its 2 layers. Layer 1 has a forward or an attention implementation of its own",
    (a_forward_of_its_own, 0): r"attention of layer 1 was called after 0 of 2 layers. Layer 0 has a forward",
    (a_config_of_its_class, 1): r"in 1 of its 2 layers. Layer 1 has a forward or an attention implementation",
    (run_twice, 0): r"attention of layer 0 was called after 1 of 2 layers. Layers share a layer_idx, or one ran twice",
    (run_twice, 1): r"attention of layer 1 was called after 2 of 2 layers. Layers share a layer_idx, or one ran twice",
}


@pytest.mark.parametrize("change, layer", FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_layer_that_passes_the_engine_by_is_a_fault_on_every_rank_before_any_token(change, layer):
    models = [fresh() for _ in range(2)]
    for model in models:
        change(model.model.layers[layer])

    def body(topology):
        with attach(models[topology.rank], topology, JobConfig(prefill_context_parallel_size=2)) as engine:
            for _ in range(2):  # the first step is no exception
                with pytest.raises(EngineFaultError, match=FAULTS[change, layer]):
                    next(engine.stream([PROMPT], GREEDY))
        return True

    assert run_ranks(RankGrid(pcp_size=2, dcp_size=2), body) == [True, True]


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_latent_attention_is_counted_as_any_other(family):
    """Two layers that call one module would write one place in the cache."""
    model = fresh(family)
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with (
        pytest.raises(UserError, match=re.escape("model.layers.0.self_attn runs as layer 1 and has layer_idx 0")),
        attach(model, config=CONFIG),
    ):
        pytest.fail("the block must not be entered")
