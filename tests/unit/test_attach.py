"""Attaching: inside the block the engine has the model, after it the model is what it was, bit by bit."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import EngineConfig, JobConfig, ParallelConfig, TensorParallel
from cpinfer.engine.attach import attach, check_layout, model_spec
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.kv_expansion import expand_kv_heads
from cpinfer.models.runner import attached
from cpinfer_tools.run_config import RunConfig
from tiny_models import FAMILIES, make_model

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIG = EngineConfig(kv_cache_gib=0.001, block_size=4)
GREEDY = cpinfer.SamplingParams(temperature=0, max_new_tokens=4)
IDS = torch.arange(10)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE), dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    model.model.layers[1].mlp.eval()  # a job may have set modes module by module
    model.lm_head.weight.requires_grad_(False)
    return model


def photograph(model):
    """Everything of a model that attaching could change."""
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    return {
        "logits": logits.clone(),
        "state": {name: x.clone() for name, x in model.state_dict().items()},
        "parameters": {name: (id(x), x.data_ptr(), x.requires_grad) for name, x in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        # What instances have of their own: a `forward` among it would hide that of the class.
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in model.named_modules()
        },
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "attention": model.config._attn_implementation,
        "config": copy.deepcopy(model.config.to_dict()),
        "generation_config": copy.deepcopy(model.generation_config.to_dict()),
    }


def assert_same(before, after):
    assert torch.equal(before.pop("logits"), after.pop("logits"))
    old, new = before.pop("state"), after.pop("state")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert before == after


def test_a_model_made_from_the_same_config_object_runs_on_beside_an_attached_one(model):
    reference = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert reference.config is model.config
    with torch.no_grad():
        before = reference(input_ids=IDS, use_cache=False).logits
        with attach(model, config=CONFIG):
            assert torch.equal(reference(input_ids=IDS, use_cache=False).logits, before)
            with pytest.raises(RuntimeError, match="attached to a cpinfer engine"):
                model(input_ids=IDS, use_cache=False)
    assert reference.config is model.config


def test_the_model_is_bit_by_bit_what_it_was(model):
    before = photograph(model)
    with attach(model, config=CONFIG) as engine:
        results = engine.generate([[1, 2, 3, 4, 5], [6]], GREEDY)
        assert [len(r.token_ids) for r in results] == [4, 4]
    assert_same(before, photograph(model))


def test_a_photograph_would_show_a_change(model):
    """The control: each of these must be seen."""
    for change in (
        lambda m: m.eval(),
        lambda m: m.model.norm.weight.data.add_(1e-6),
        lambda m: setattr(m.config, "_attn_implementation", "eager"),
        lambda m: m.lm_head.weight.requires_grad_(True),
        lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
        lambda m: setattr(m.model.layers[0], "extra", nn.Identity()),
        lambda m: setattr(m.model.layers[0].mlp, "forward", m.model.layers[0].mlp.forward),
        lambda m: setattr(m.model.layers[0].self_attn, "layer_idx", 1),
    ):
        changed = copy.deepcopy(model)
        before = photograph(changed)
        change(changed)
        with pytest.raises(AssertionError):
            assert_same(before, photograph(changed))


def test_the_weights_are_the_models_own_and_not_copies(model):
    with attach(model, config=CONFIG) as engine:
        first = engine.generate([[1, 2, 3]], GREEDY)[0].logprobs
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert engine.generate([[1, 2, 3]], GREEDY)[0].logprobs != first


def test_the_engine_runs_in_evaluation_mode(model):
    with attach(model, config=CONFIG):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.model.layers[1].mlp.training


def test_the_model_cannot_be_run_past_the_engine(model):
    with attach(model, config=CONFIG), pytest.raises(RuntimeError, match=r"leave the `with cpinfer\.attach"):
        model(input_ids=IDS)
    model(input_ids=IDS)


def test_a_model_trains_on_after_the_block(model):
    with attach(model, config=CONFIG) as engine:
        engine.generate([[1, 2, 3]], GREEDY)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


def test_a_block_that_fails_still_gives_the_model_back(model):
    before = photograph(model)
    with pytest.raises(KeyError, match="mine"), attach(model, config=CONFIG) as engine:
        engine.generate([[1, 2, 3]], GREEDY)
        raise KeyError("mine")
    assert_same(before, photograph(model))


def test_a_prompt_that_is_refused_leaves_engine_and_model_usable(model):
    before = photograph(model)
    with attach(model, config=CONFIG) as engine:
        for bad, complaint in (
            ([64], "token id 64"),
            ([], "the prompt is empty"),
            ([1] * 999, "the prompt has 999 tokens"),
        ):
            with pytest.raises(UserError, match=f"^prompt 1: {complaint}"):
                engine.generate([[1, 2], bad], GREEDY)
        assert len(engine.generate([[1, 2]], GREEDY)) == 1
    assert_same(before, photograph(model))


def test_an_engine_that_cannot_be_made_leaves_the_model_alone(model):
    before = photograph(model)
    with pytest.raises(UserError, match="buys no block"), attach(model, config=EngineConfig(kv_cache_gib=1e-9)):
        pytest.fail("the block must not be entered")
    assert_same(before, photograph(model))


def test_blocks_may_follow_each_other(model):
    texts = []
    for _ in range(2):
        with attach(model, config=CONFIG) as engine:
            texts.append(engine.generate([[1, 2, 3]], GREEDY)[0].token_ids)
    assert texts[0] == texts[1]


# --- the topology owns the layout; a config in any form ---

PCP2 = RankGrid(pcp_size=2, dcp_size=2)
SAID = {"kv_cache_gib": 0.001, "block_size": 4, "max_num_seqs": 3}


def on_both(model, *config, grid=PCP2, **keys):
    """Tokens and the engine's config on each of two ranks."""

    def body(topology):
        with attach(copy.deepcopy(model), topology, *config, **keys) as engine:
            return [r.token_ids for r in engine.generate([[1, 2, 3, 4, 5], [6]], GREEDY)], engine._config

    return run_ranks(grid, body)


def alone(model):
    with attach(model) as engine:
        return [r.token_ids for r in engine.generate([[1, 2, 3, 4, 5], [6]], GREEDY)]


def test_a_topology_is_all_that_a_layout_takes(model):
    expected = alone(model)
    for grid in (PCP2, RankGrid(pcp_size=2), RankGrid(pcp_size=1, dp_size=2)):
        assert [tokens for tokens, _ in on_both(model, grid=grid)] == [expected, expected]


def test_keys_of_the_engine_are_keywords_and_win_over_a_config(model):
    for given in ((), ({"max_num_seqs": 5},), (EngineConfig(max_num_seqs=5),)):
        for tokens, config in on_both(model, *given, max_num_seqs=3, block_size=4):
            assert (config.max_num_seqs, config.block_size) == (3, 4)
            assert tokens == alone(model)


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"max_num_seq": 3}, 'unknown key "max_num_seq"; the nearest known key is "max_num_seqs"'),
        ({"prefill_context_parallel_size": 2}, "the layout is the topology's"),
        ({"sampling": {"temperature": 0}}, "which takes it with each call. Give it to generate"),
        ({"max_num_seqs": 0}, '"max_num_seqs" is 0; it must be'),
        ({"speculative_model": "m"}, "does not support speculative decoding"),
    ],
)
def test_a_keyword_that_is_no_key_of_the_engine_is_refused(model, keys, complaint):
    with pytest.raises(UserError, match=complaint), attach(model, **keys):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize("form", ["engine", "job", "run", "dict", "dict with sizes", "path", "text"])
def test_a_config_comes_in_any_form(model, form, tmp_path):
    path = tmp_path / "run.json"
    tools = {"evaluation": {"tasks": ["vt"]}, "input": "in.jsonl", "sampling": {"n": 3}, "model": "elsewhere"}
    path.write_text(json.dumps({**SAID, **tools, "wandb": {}, "prefill_context_parallel_size": 2}))
    given = {
        "engine": EngineConfig(**SAID),
        "job": JobConfig(**SAID, sampling={"n": 3}),
        "run": RunConfig(**SAID, dtype="float32", input="in.jsonl"),
        "dict": SAID,
        "dict with sizes": {**SAID, "prefill_context_parallel_size": 2, "decode_context_parallel_size": 2},
        "path": path,
        "text": str(path),
    }[form]
    expected = alone(model)
    for tokens, config in on_both(model, given):
        assert tokens == expected, "one sample of each prompt: sampling goes with the call"
        assert {name: getattr(config, name) for name in SAID} == SAID


def test_an_engine_has_the_very_config_that_was_given_neither_copied_nor_checked_again(model, monkeypatch):
    given = [JobConfig(**SAID), RunConfig(**SAID, dtype="float32"), EngineConfig(**SAID)]
    monkeypatch.setattr(EngineConfig, "__post_init__", lambda self: pytest.fail("checked again"))
    for config in given:
        with attach(model, config=config) as engine:
            assert engine._config is config


@pytest.mark.parametrize(
    "config, complaint",
    [
        ({"max_num_seq": 3}, 'unknown key "max_num_seq"; the nearest known key is "max_num_seqs"'),
        ({"evaluations": {}}, 'unknown key "evaluations"'),
        ({"sampling": {"n": 2}}, 'the config has "sampling".* Give it to generate'),
        (3, "the config is 3; an object, a dict, the path of a file or None was wanted"),
        ("no-such.json", r"config no-such\.json: No such file"),
        (ParallelConfig(), 'the config is "ParallelConfig'),
    ],
)
def test_what_is_no_config_is_refused(model, config, complaint):
    with pytest.raises(UserError, match=complaint), attach(model, None, config):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize(
    "said, complaint",
    [
        ({"tensor_parallel": {"tp_size": 2}}, "the config says tp=2, the topology tp=1"),
        ({"prefill_context_parallel_size": 1}, "the config says pcp=1, the topology pcp=2"),
        ({"prefill_context_parallel_size": 2, "decode_context_parallel_size": 1}, "says dcp=1, the topology dcp=2"),
        ({"data_parallel_size": 2}, "the config says dp=2, the topology dp=1"),
        ({"prefill_context_parallel_size": 4, "data_parallel_size": 2}, "says pcp=4 dp=2, the topology pcp=2 dp=1"),
    ],
)
def test_a_config_that_says_other_sizes_than_the_topology_is_refused(model, said, complaint, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(said))
    before = photograph(model)

    def body(topology):
        for config in (said, JobConfig(**said), path):
            with pytest.raises(UserError, match=complaint), attach(model, topology, config):
                pytest.fail("the block must not be entered")
        return True

    assert run_ranks(PCP2, body) == [True, True]
    assert_same(before, photograph(model))


def test_a_dtype_that_the_weights_do_not_have_is_refused(model):
    before = photograph(model)
    for dtype in ("bfloat16", "float16"):
        complaint = f'the config says dtype "{dtype}", the model\'s weights are float32 in use. Leave dtype out'
        for given in ({"dtype": dtype}, RunConfig(dtype=dtype)):
            with pytest.raises(UserError, match=complaint), attach(model, None, given):
                pytest.fail("the block must not be entered")
        with pytest.raises(UserError, match=complaint), attach(model, dtype=dtype):
            pytest.fail("the block must not be entered")
    assert_same(before, photograph(model))
    for dtype in ("auto", "float32"):
        with attach(model, dtype=dtype) as engine:
            assert engine._runner.dtype == torch.float32
    with attach(model.to(torch.bfloat16), dtype="bfloat16") as engine:
        assert engine._runner.dtype == torch.bfloat16


def test_an_engine_that_is_told_nothing_samples_by_the_defaults(model):
    prompt, default = {"prompt_token_ids": [1, 2, 3], "id": "a"}, cpinfer.SamplingParams()
    with attach(model, config=JobConfig(sampling={"max_new_tokens": 1})) as engine:
        told, untold = engine.generate([prompt], default), engine.generate([prompt])
    assert [r.token_ids for r in untold] == [r.token_ids for r in told]
    assert len(untold[0].token_ids) > 1


def test_a_layout_that_the_heads_do_not_allow_is_refused(model):
    with pytest.raises(UserError, match="4 query heads do not divide over tp=3"):
        check_layout(model_spec(model), EngineConfig(), RankGrid(tp_size=3))


def test_replicated_queries_are_refused_by_name_where_a_home_spans_tp_ranks(model):
    """Rows are replicated over pcp ranks; tp ranks of a home have other query heads."""
    model.config.num_key_value_heads = 1
    config = EngineConfig(decode_exchange="replicate_q")
    with pytest.raises(UserError, match=r'tp=2 pcp=1 dcp=2: .*"replicate_q".* dcp of at most pcp'):
        check_layout(model_spec(model), config, RankGrid(tp_size=2, dcp_size=2))
    check_layout(model_spec(model), replace(config, decode_exchange="ag_rs"), RankGrid(tp_size=2, dcp_size=2))
    check_layout(model_spec(model), config, RankGrid(pcp_size=2, dcp_size=2))


def test_weights_that_are_not_sharded_as_the_config_says_are_refused(model):
    """The model holds all its heads, while tp=2 gives each rank half of them."""
    config = JobConfig(tensor_parallel=TensorParallel(2), kv_cache_gib=0.001)
    before = photograph(model)

    def body(topology):
        with (
            pytest.raises(UserError, match=r"has 32 rows on this rank, 4 heads;.* over tp=2 it should have 16"),
            attach(model, topology, config),
        ):
            pytest.fail("the block must not be entered")
        return True

    assert run_ranks(RankGrid(tp_size=2), body) == [True, True]
    assert_same(before, photograph(model))


def test_a_model_expanded_for_more_ranks_is_refused_on_one(model):
    expand_kv_heads(model, 4)
    with (
        pytest.raises(UserError, match=r"k_proj has 32 rows on this rank, 4 heads; .* over tp=1 it should have 16"),
        attach(model, config=CONFIG),
    ):
        pytest.fail("the block must not be entered")


def test_what_is_no_hugging_face_model_is_refused_in_words():
    with (
        pytest.raises(UserError, match=r"given a Linear; a Hugging Face model was wanted.*\.module"),
        attach(nn.Linear(1, 1)),
    ):
        pytest.fail("the block must not be entered")


def test_a_model_that_is_not_supported_is_refused_by_name():
    shape = {**SHAPE, "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**shape), dtype=torch.float32)
    with pytest.raises(UnsupportedError, match='"qwen2_moe"'), attach(model):
        pytest.fail("the block must not be entered")


# --- families whose modules are changed for the length of the block ---

# How many modules get a forward of their own there: experts, and attention with latents or of keywords not handed on.
CHANGED = {
    "mixtral": 2, "qwen3_moe": 2, "gpt_oss": 2, "deepseek_v2": 3, "deepseek_v3": 3, "gpt_bigcode": 0, "nemotron": 2,
    "phimoe": 4,
}  # fmt: skip


@pytest.mark.parametrize("family", CHANGED)
def test_modules_that_are_changed_in_the_block_are_what_they_were_after_it(family):
    model = make_model(FAMILIES[family])
    before = photograph(model)
    with attach(model, config=CONFIG) as engine:
        assert sum("forward" in vars(module) for module in model.modules()) == CHANGED[family]
        engine.generate([[1, 2, 3, 4, 5], [6]], GREEDY)
    assert_same(before, photograph(model))


@pytest.mark.parametrize("fails", [False, True])
def test_gpt_bigcode_cuts_its_projection_by_this_ranks_heads_in_the_block_alone(fails):
    """AutoTP gives a rank of two 4 of the 8 query heads, and the one KV head whole."""
    model = make_model(FAMILIES["gpt_bigcode"])
    layers = [block.attn for block in model.transformer.h]
    for attention in layers:
        attention.c_attn.weight.data = attention.c_attn.weight.data[: 4 * 8 + 2 * 8]
    try:
        with attached(model, model_spec(model), tp_size=2, tp_rank=1):
            assert [attention.embed_dim for attention in layers] == [32, 32]
            if fails:
                raise KeyError("mine")
    except KeyError:
        assert fails
    assert [attention.embed_dim for attention in layers] == [64, 64]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_modules_are_given_back_by_a_block_that_fails(family):
    model = make_model(FAMILIES[family])
    before = photograph(model)
    with pytest.raises(KeyError, match="mine"), attach(model, config=CONFIG):
        raise KeyError("mine")
    assert_same(before, photograph(model))
    with pytest.raises(UserError, match="buys no block"), attach(model, config=EngineConfig(kv_cache_gib=1e-9)):
        pytest.fail("the block must not be entered")
    assert_same(before | photograph(model), photograph(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_forward_that_a_job_has_put_on_experts_is_called_and_put_back(family):
    """As Accelerate's hooks do."""
    model = make_model(FAMILIES[family])
    block = model.model.layers[0].mlp
    called, inner = [], block.forward

    def forward(hidden_states):
        called.append(hidden_states.shape[1])
        return inner(hidden_states)

    block.forward = forward
    with attach(model, config=CONFIG) as engine:
        engine.generate([[1, 2, 3]], GREEDY)
    assert called == [3, 1, 1, 1]
    assert block.forward is forward


@pytest.mark.parametrize("family", CHANGED)
def test_no_changed_model_can_be_run_past_the_engine(family):
    model = make_model(FAMILIES[family])
    with attach(model, config=CONFIG), pytest.raises(RuntimeError, match=r"leave the `with cpinfer\.attach"):
        model(input_ids=IDS)
    model(input_ids=IDS)


@pytest.mark.parametrize(
    "family, projection",
    [("deepseek_v2", "kv_b_proj"), ("deepseek_v3", "q_b_proj"), ("deepseek_v2", "q_proj"), ("gpt_bigcode", "c_attn")],
)
def test_projections_of_every_family_that_are_not_sharded_as_the_config_says_are_refused(family, projection):
    """The model is whole, while tp=2 gives each rank half of its heads; and the others are cut."""
    model = make_model(FAMILIES[family])
    config = JobConfig(tensor_parallel=TensorParallel(2, "autotp"), kv_cache_gib=0.001)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "q_b_proj", "kv_b_proj", "c_attn")) and not name.endswith(projection):
            module.weight.data = module.weight.data[: len(module.weight) // 2]
    before = dict(model.named_modules())

    def body(topology):
        with (
            pytest.raises(UserError, match=rf"{projection} has \d+ rows on this rank"),
            attach(model, topology, config),
        ):
            pytest.fail("the block must not be entered")
        return True

    assert run_ranks(RankGrid(tp_size=2), body) == [True, True]
    assert dict(model.named_modules()) == before


def refused(*given, **keys):
    with pytest.raises(UserError) as caught, cpinfer.attach(make_model(FAMILIES["llama"]), *given, **keys):
        pass
    return str(caught.value)


@pytest.mark.parametrize("given", [{"max_num_seqs": 64}, "configs/single.json", EngineConfig()])
def test_a_config_in_the_place_of_the_topology_is_told_where_it_goes(given):
    assert "as its topology. Give a config as `config=`" in refused(given)


def test_a_pool_beyond_all_memory_is_refused_before_its_blocks_are_written_down():
    assert "kv_cache_gib=16000 is more than the" in refused(kv_cache_gib=16000.0)


def test_a_tokenizer_that_is_none_is_refused():
    assert "the tokenizer is a str" in refused(tokenizer="configs/recall-tiny")


def test_what_only_tools_read_is_passed_over_in_a_dict_as_in_a_file():
    with cpinfer.attach(
        make_model(FAMILIES["llama"]), config={"evaluation": {"tasks": ["vt"]}, "input": "x"}
    ) as engine:
        assert engine.is_awake
    assert 'unknown key "inputs"' in refused(None, {"inputs": "x"})
