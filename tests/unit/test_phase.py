"""Rollout phases: the model is lent for the length of a block and comes back as it was."""

import json

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cpinfer.colocate.phase import Lent, rollout_phase
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig, JobConfig, SamplingParams
from cpinfer.errors import UserError
from cpinfer.models.hooks import hooks_disabled
from cpinfer_integrations.lending import lend
from tiny_models import FAMILIES, make_model

CONFIG = EngineConfig(dtype="float32", kv_cache_gib=0.001)
GREEDY = SamplingParams(temperature=0, max_new_tokens=4)


def lent() -> Lent:
    return Lent(make_model(FAMILIES["qwen2"]), Topology.single())


def test_results_say_the_version_of_the_weights_and_the_pool_is_gone_after_the_phase():
    with rollout_phase(lent(), CONFIG, weights_version=7) as engine:
        assert [r.weights_version for r in engine.generate([[1, 2, 3]], GREEDY)] == [7]
        assert engine.is_awake
    assert not engine.is_awake


def test_an_optimizer_step_inside_a_phase_is_refused_and_allowed_after_it():
    given = lent()
    optimizer = torch.optim.SGD(given.module.parameters(), lr=0.1)
    before = given.module.lm_head.weight.clone()
    given.module.lm_head.weight.grad = torch.ones_like(before)
    with rollout_phase(given, CONFIG), pytest.raises(RuntimeError, match="inside a rollout phase"):
        optimizer.step()
    assert torch.equal(given.module.lm_head.weight, before)
    optimizer.step()
    assert not torch.equal(given.module.lm_head.weight, before)


def test_of_a_compiled_model_the_model_inside_is_lent():
    module = make_model(FAMILIES["qwen2"])
    compiled = torch.compile(module, backend="eager")
    with rollout_phase(lend(compiled, CONFIG), CONFIG) as engine:
        results = engine.generate([[1, 2, 3]], GREEDY)
    with rollout_phase(lend(module, CONFIG), CONFIG) as engine:
        assert [r.token_ids for r in results] == [r.token_ids for r in engine.generate([[1, 2, 3]], GREEDY)]


def test_lending_and_a_phase_take_a_config_in_any_form(tmp_path):
    module, path = make_model(FAMILIES["qwen2"]), tmp_path / "run.json"
    path.write_text(json.dumps({"kv_cache_gib": 0.001, "comparison": {}, "rollout": {"mismatch_every": 0}}))
    for config in (None, CONFIG, JobConfig(kv_cache_gib=0.001), {"kv_cache_gib": 0.001}, path):
        with rollout_phase(lend(module, config), config) as engine:
            assert engine.generate([[1, 2, 3]], GREEDY)
    lend(module, {"comparison": {}})  # of a run, as in a file
    with pytest.raises(UserError, match='unknown key "comparisons"'):
        lend(module, {"comparisons": {}})


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupt_in_the_middle_of_a_stream_leaves_the_model_restored(stop):
    given = lent()
    given.module.train()
    attention = given.module.config._attn_implementation
    with pytest.raises(stop), rollout_phase(given, CONFIG) as engine:
        for _ in engine.stream([[1, 2], [3, 4, 5]], GREEDY):
            raise stop
    assert given.module.config._attn_implementation == attention
    assert all(module.training for module in given.module.modules())
    torch.optim.SGD(given.module.parameters(), lr=0.1).step()


def test_a_phase_draws_no_random_numbers_of_the_trainers():
    given = lent()
    before = torch.get_rng_state()
    with rollout_phase(given, CONFIG) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(temperature=1, n=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_hooks_of_the_named_package_sleep_and_all_come_back_in_order():
    calls = []

    def foreign(*_):
        calls.append("foreign")

    def trainers(*_):
        calls.append("trainers")

    trainers.__module__ = "trainer.zero.hooks"
    model = nn.Linear(2, 2)
    handle = model.register_forward_pre_hook(trainers)
    model.register_forward_pre_hook(foreign)
    model.register_forward_hook(trainers)
    with hooks_disabled(model, "trainer"):
        model(torch.ones(1, 2))
    assert calls == ["foreign"]
    model(torch.ones(1, 2))
    assert calls == ["foreign", "trainers", "foreign", "trainers"]
    handle.remove()
    model(torch.ones(1, 2))
    assert calls[4:] == ["foreign", "trainers"]


def test_a_phase_of_what_nobody_has_lent_is_refused_with_how_to_lend_it():
    model = make_model(FAMILIES["qwen2"])
    with pytest.raises(UserError, match=r"given a Qwen2ForCausalLM; .*lend\(model, config\)"), rollout_phase(model):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"tensor_parallel": {"tp_size": 2}}, "tp_size is 2; every rank of this job trains a whole model"),
        ({"data_parallel_size": 2}, r"data_parallel_size is 2; 1 rank\(s\) with pcp=1 are dp=1"),
        ({"prefill_context_parallel_size": 2}, r"pcp=2 does not divide the job's 1 replica"),
    ],
)
def test_sizes_that_a_job_of_whole_replicas_cannot_have_are_refused_when_it_lends(sizes, says):
    model = make_model(FAMILIES["qwen2"])
    with pytest.raises(UserError, match=says):
        lend(model, sizes)
    assert lend(model, {"tensor_parallel": {"tp_size": 1}, "data_parallel_size": 1}).topology.grid.world_size == 1


def test_fsdp_around_a_module_of_somebodys_own_is_refused_when_it_lends():
    class Sharded(FSDPModule, nn.Module):
        pass

    sharded = object.__new__(Sharded)  # what fully_shard makes of a module, without ranks
    nn.Module.__init__(sharded)
    sharded.policy = make_model(FAMILIES["qwen2"])
    with pytest.raises(UserError, match="FSDP2 whose outermost fully_shard was called on a wrapper"):
        lend(sharded)
