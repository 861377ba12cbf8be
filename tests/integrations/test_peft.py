"""PEFT models: active adapters are in effect, exactly; a switch is a weight change; what cannot be is refused."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from cpinfer.colocate.weight_slices import sliced_projections
from cpinfer.comm.threads import run_ranks
from cpinfer.config import EngineConfig, JobConfig, SamplingParams, TensorParallel
from cpinfer.engine.attach import attach, model_spec
from cpinfer.errors import ModelChangedError, UnsupportedError, UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of

CONFIG = EngineConfig(dtype="float32", kv_cache_gib=0.001)
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
PROMPTS = prompts_of((3, 40), vocab_size=128)
SMALL = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], init_lora_weights=False)


def model_with(*adapters, family="qwen2"):
    """Random adapters `a`, `b`, ... strong enough to change answers; `a` is active."""
    torch.manual_seed(1)
    model = get_peft_model(make_model(copy.deepcopy(FAMILIES[family])), adapters[0], adapter_name="a")
    for name, adapter in zip("bcd", adapters[1:], strict=False):
        model.add_adapter(name, adapter)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(5)
    return model


def check_exact(model, results):
    for result in results:
        assert list(result.token_ids) == check_rollout.generate_greedy(model, result.prompt_token_ids, 8)
        scores = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert (scores - torch.tensor(result.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "mixtral"])
def test_an_active_lora_answers_as_the_peft_model_does(family):
    model = model_with(LORA, family=family)
    with attach(model, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    check_exact(model, results)
    with model.disable_adapter():
        plain = [check_rollout.generate_greedy(model, r.prompt_token_ids, 8) for r in results]
    assert [list(r.token_ids) for r in results] != plain, "an adapter that says nothing would prove nothing"


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        LoraConfig(
            r=4, target_modules=["k_proj"], modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False
        ),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    ],
    ids=["dora", "modules_to_save", "ia3"],
)
def test_other_adapters_in_modules_answer_as_the_peft_model_does(adapter):
    model = model_with(adapter)
    with attach(model, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    check_exact(model, results)


def test_the_latent_projections_outside_kv_b_proj_take_adapters():
    model = model_with(
        LoraConfig(r=4, target_modules=["q_b_proj", "o_proj"], init_lora_weights=False), family="deepseek_v3"
    )
    with attach(model, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    check_exact(model, results)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_layers_that_an_adapter_replicates_have_places_of_their_own(family):
    """They share weights, but for what each adapts, and hold copies of the config they were made with."""
    model = model_with(LoraConfig(**SMALL, layer_replication=[[0, 2], [1, 2]]), family=family)
    assert len(model.get_base_model().model.layers) == 3
    with attach(model, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    check_exact(model, results)


@pytest.mark.parametrize(
    "family, saved",
    [
        ("llama", "self_attn"),
        ("gemma2", "self_attn"),
        ("deepseek_v3", "self_attn"),
        ("mixtral", "layers.1"),
        ("gpt_oss", "layers.1"),
        ("mixtral", "mlp"),
    ],
)
def test_whole_modules_that_an_adapter_saves_attend_by_the_engine(family, saved):
    """A copy of each, config and all, in place of the original; the adapter says which of them runs."""
    model = model_with(LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=[saved]), family=family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name and name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.mul_(1.5)
    with attach(model, config=CONFIG) as engine:
        adapted = engine.generate(PROMPTS, GREEDY)
        with model.disable_adapter():
            plain = engine.generate(PROMPTS, GREEDY)
    check_exact(model, adapted)
    with model.disable_adapter():
        check_exact(model, plain)
    assert [r.logprobs for r in adapted] != [r.logprobs for r in plain]


def test_adapters_of_several_kinds_at_once_answer_as_the_mixed_model_does():
    model = get_peft_model(make_model(copy.deepcopy(FAMILIES["llama"])), LoraConfig(**SMALL), "a", mixed=True)
    model.add_adapter("b", LoHaConfig(r=4, target_modules=["v_proj", "up_proj"], init_weights=False))
    model.set_adapter(["a", "b"])
    with attach(model, config=CONFIG) as engine:
        both = engine.generate(PROMPTS, GREEDY)
        model.set_adapter("a")
        one = engine.generate(PROMPTS, GREEDY)
    check_exact(model, one)
    model.set_adapter(["a", "b"])
    check_exact(model, both)
    assert [r.logprobs for r in both] != [r.logprobs for r in one]


def test_adapters_around_an_attached_model_are_refused_as_it_is():
    model = model_with(LORA)
    with (
        attach(model.get_base_model(), config=CONFIG),
        pytest.raises(UserError, match="attached to an engine already"),
        attach(model, config=CONFIG),
    ):
        pytest.fail("the block must not be entered")


def test_an_adapter_that_is_added_inside_the_block_stops_the_next_call():
    """Its dropout would be on: nobody has put it into evaluation mode."""
    model = model_with(LORA)
    with attach(model, config=CONFIG) as engine:
        model.add_adapter("b", LoraConfig(**SMALL, lora_dropout=0.5))
        with pytest.raises(ModelChangedError, match=r"modules in .*q_proj.lora_dropout were added"):
            engine.generate(PROMPTS, GREEDY)


CHANGES = {
    "switch": lambda model: model.set_adapter("b"),
    "merge": lambda model: model.merge_adapter(["a"]),
    "scale": lambda model: [m.set_scale("a", 3.0) for m in model.modules() if isinstance(m, LoraLayer)],
    "disable": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_adapters_are_noticed_by_the_next_call_which_finds_no_old_prefix(change):
    model = model_with(LORA, LORA)
    with attach(model, config=CONFIG) as engine:
        before = engine.generate(PROMPTS, GREEDY)
        assert engine.generate(PROMPTS, GREEDY)[0].weights_version == 0
        assert engine.stats.num_cached_prefill_tokens > 0
        change(model)
        after = engine.generate(PROMPTS, GREEDY)
        assert engine.stats.num_cached_prefill_tokens == 0
        assert {r.weights_version for r in after} == {before[0].weights_version + 1}
        engine.score([(PROMPTS[1], (1, 2))])
        assert engine.weights_version == 1
    check_exact(model, after)


def test_scores_notice_a_switch_as_well():
    model = model_with(LORA, LORA)
    pair = (PROMPTS[1], (5, 6))
    with attach(model, config=CONFIG) as engine:
        first = engine.score([pair])
        model.set_adapter("b")
        second = engine.score([pair])
        assert engine.weights_version == 1 and first != second
    found = check_rollout.score(model, *pair)
    assert (found - torch.tensor(second[0].logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[1, 2]),
    ],
    ids=["prompt", "prefix", "alora"],
)
def test_adapters_outside_the_modules_they_change_are_refused_by_name(adapter):
    model = get_peft_model(make_model(copy.deepcopy(FAMILIES["qwen2"])), adapter)
    with (
        pytest.raises(UnsupportedError, match=r'adapter "default".*do not sit in the modules'),
        attach(model, config=CONFIG),
    ):
        pytest.fail("the block must not be entered")


def test_adapters_under_tensor_parallelism_are_refused_by_name():
    model = model_with(LORA)
    config = JobConfig(tensor_parallel=TensorParallel(2), kv_cache_gib=0.001)

    def body(topology):
        with (
            pytest.raises(UnsupportedError, match="adapters under tensor parallelism"),
            attach(model, topology, config),
        ):
            pytest.fail("the block must not be entered")
        with pytest.raises(UnsupportedError, match="adapters under tensor parallelism"):
            sliced_projections(model.get_base_model(), model_spec(model), 2, 0)
        return True

    assert run_ranks(RankGrid(tp_size=2), body) == [True, True]


def test_a_peft_model_is_given_back_as_it_was():
    model = model_with(LORA)
    model.train()
    before = {name: (id(m), m.training) for name, m in model.named_modules()}
    weights = {name: (id(x), x.requires_grad, x.clone()) for name, x in model.named_parameters()}
    with attach(model, config=CONFIG) as engine:
        engine.generate(PROMPTS, GREEDY)
    assert before == {name: (id(m), m.training) for name, m in model.named_modules()}
    for name, x in model.named_parameters():
        assert weights[name][:2] == (id(x), x.requires_grad) and torch.equal(weights[name][2], x)
