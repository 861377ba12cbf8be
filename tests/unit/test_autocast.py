"""Forwards under autocast around float32 weights: what attention gets and caches is what it gets in training."""

import copy
import re
import sys

import pytest
import torch
from torch import nn

from cpinfer.attention.layer import AttentionLayer
from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.engine.attach import attach
from cpinfer.errors import UserError
from cpinfer.models.autocast import CastStep, autocast_dtype
from every_family import WITH_STATES
from tiny_models import FAMILIES, make_model, prompts_of

CONFIG = EngineConfig(dtype="float32", kv_cache_gib=0.001)
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
PROMPTS = prompts_of((3, 40, 90), vocab_size=128)


def mixed_model(family):
    """As Accelerate prepares it: autocast put around the forward of this instance."""
    model = make_model(copy.deepcopy(FAMILIES[family]))
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


@torch.no_grad()
def logprobs(model, result):
    ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    places = range(len(result.prompt_token_ids) - 1, ids.shape[1] - 1)
    return torch.stack([logits[place, ids[0, place + 1]] for place in places])


def test_what_the_forward_casts_to_is_found_without_computing_anything():
    mixed, plain = mixed_model("qwen2"), make_model(copy.deepcopy(FAMILIES["qwen2"]))
    decoder = mixed.model
    decoder.register_forward_pre_hook(lambda *_: pytest.fail("nothing may run"))
    assert autocast_dtype(mixed, mixed) is torch.bfloat16
    assert mixed.model is decoder
    assert autocast_dtype(plain, plain) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(plain, plain) is torch.bfloat16


class Around(nn.Module):
    """A value head of another library, or one without a forward."""

    def __init__(self, model, forward=None):
        super().__init__()
        self.pretrained_model = model
        if forward is not None:
            self.forward = forward


@pytest.mark.parametrize("forward", [None, lambda tokens: tokens, lambda input_ids: input_ids])
def test_a_forward_that_cannot_be_asked_is_refused_with_what_to_pass(forward):
    model = make_model(FAMILIES["qwen2"])
    decoder = model.model
    with pytest.raises(UserError, match=r"Around could not be run on input_ids .*Pass the Qwen2ForCausalLM inside"):
        autocast_dtype(Around(model, forward), model)
    assert model.model is decoder


@pytest.mark.parametrize("family, share", [("qwen2", 0.1), ("mixtral", 0.2), ("gemma2", 0.8), ("deepseek_v3", 0.8)])
def test_rollouts_under_autocast_are_nearer_to_the_training_forward_than_float32_is(family, share):
    """With the same kernels they would be equal; those of MLA and of soft caps round in other places."""
    mixed, plain = mixed_model(family), make_model(copy.deepcopy(FAMILIES[family]))
    with attach(mixed, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    training = torch.cat([logprobs(mixed, r) for r in results])
    ours = torch.cat([torch.tensor(r.logprobs) for r in results])
    exact = torch.cat([logprobs(plain, r) for r in results])
    assert (ours - training).abs().mean() < share * (exact - training).abs().mean()


@pytest.mark.parametrize(
    "family, share",
    [("qwen3_5_text", 0.1), *(pytest.param(f, 0.6, marks=pytest.mark.slow) for f in sorted(WITH_STATES))],
)
def test_linear_attention_is_that_of_a_training_forward_whose_rule_keeps_its_precision(monkeypatch, family, share):
    """As `flash-linear-attention` has it. Transformers' own, in torch, is cast: that alone moves logprobs so far."""
    mixed, plain = mixed_model(family), make_model(copy.deepcopy(FAMILIES[family]))
    with attach(mixed, config=CONFIG) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    ours = torch.cat([torch.tensor(r.logprobs) for r in results])
    cast = torch.cat([logprobs(mixed, r) for r in results])
    exact = torch.cat([logprobs(plain, r) for r in results])
    file = sys.modules[type(mixed).__module__]
    rule = next(name for name in vars(file) if re.fullmatch(r"(torch_)?chunk_\w+_delta_\w+", name))
    monkeypatch.setattr(file, rule, torch.autocast("cpu", enabled=False)(getattr(file, rule)))
    training = torch.cat([logprobs(mixed, r) for r in results])
    assert (ours - training).abs().mean() < share * (exact - training).abs().mean()
    assert (ours - cast).abs().mean() > 0.5 * (exact - cast).abs().mean()


def test_the_pool_holds_what_the_forward_casts_to_and_so_twice_the_tokens():
    mixed, plain = mixed_model("qwen2"), make_model(copy.deepcopy(FAMILIES["qwen2"]))
    with attach(mixed, config=CONFIG) as half, attach(plain, config=CONFIG) as single:
        assert half.kv_capacity_tokens >= 2 * single.kv_capacity_tokens
        assert half.kv_pool_bytes <= 0.001 * 2**30


def test_attention_keeps_its_own_precision_inside_autocast():
    seen = []

    class Step:
        num_tokens = 1

        def attend(self, layer, q, k, v):
            seen.append((torch.is_autocast_enabled("cpu"), q.dtype, k.dtype, v.dtype))
            return q

    x = torch.ones(1, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        CastStep(Step(), torch.bfloat16).attend(AttentionLayer(0, 1.0), x, x.bfloat16(), x)
    assert seen == [(False, *[torch.bfloat16] * 3)]
