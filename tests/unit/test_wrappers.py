"""What stands around a causal LM is taken away, and what is none is refused by name."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from cpinfer.engine.attach import attach
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models.wrappers import refuse_all_but_models, unwrapped, without_replication
from cpinfer_integrations.lending import lend
from tiny_models import FAMILIES, make_model


@pytest.fixture
def model():
    return make_model(copy.deepcopy(FAMILIES["llama"]))


def value_head(model):
    head = nn.Module()
    head.pretrained_model, head.v_head = model, nn.Linear(1, 1)
    return head


def test_wrappers_are_taken_away_in_any_order(model):
    for wrap in (torch.compile, nn.DataParallel, value_head):
        assert unwrapped(wrap(model)) is model
        assert unwrapped(value_head(wrap(nn.DataParallel(wrap(model))))) is model
    assert unwrapped(model) is model and unwrapped("a name") == "a name"


def test_compilers_and_replicas_alone_are_taken_from_what_computes_more(model):
    adapted = value_head(torch.compile(model))
    assert without_replication(torch.compile(nn.DataParallel(torch.compile(adapted)))) is adapted
    assert without_replication(adapted) is adapted


def test_a_module_of_that_name_is_no_wrapper(model):
    model.module = nn.Linear(1, 1)
    assert unwrapped(model) is model


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_classifiers_are_refused_by_name(auto, family):
    config = copy.deepcopy(FAMILIES[family])
    config.pad_token_id = 0
    given = auto.from_config(config)
    with (
        pytest.raises(UserError, match=rf"given a {type(given).__name__}, which has no logits.*AutoModelForCausalLM"),
        attach(given),
    ):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_bigcode"])
def test_decoders_without_a_head_are_refused_by_name(family):
    given = make_model(copy.deepcopy(FAMILIES[family])).base_model
    with pytest.raises(UserError, match=rf"given a {type(given).__name__}, which has no logits"), attach(given):
        pytest.fail("the block must not be entered")


def test_a_wrapper_that_nobody_knows_is_refused_by_name(model):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

    with pytest.raises(UserError, match=r"given a Mine.*pass the causal LM that is inside it"), attach(Mine()):
        pytest.fail("the block must not be entered")


def test_fsdp1_is_refused_by_name(model):
    class FullyShardedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self._fsdp_wrapped_module, self.config = model, model.config

    with pytest.raises(UnsupportedError, match="FSDP1"), attach(FullyShardedDataParallel()):
        pytest.fail("the block must not be entered")


class Policy(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_a_model_inside_a_module_of_somebodys_own_is_named_where_it_is(model):
    for wrapped, where in ((Policy(model), "inner"), (nn.DataParallel(Policy(Policy(model))), "inner.inner")):
        where = where if not isinstance(wrapped, nn.DataParallel) else f"module.{where}"
        with pytest.raises(UserError, match=rf"lend was given a .*There is one in it, as \.{where}: pass that"):
            refuse_all_but_models(wrapped, "lend")
    refuse_all_but_models(nn.DataParallel(value_head(model)), "lend")


@pytest.mark.parametrize(
    "given, what_to_do",
    [
        ("my/model", "AutoModelForCausalLM.from_pretrained"),
        ((nn.Linear(1, 1), None), "deepspeed.initialize or prepare"),
        (nn.Linear(1, 1), r"pass its \.module"),
        (None, r"pass its \.module"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_pass(given, what_to_do):
    for what in (lambda: lend(given), lambda: attach(given).__enter__()):
        with pytest.raises(UserError, match=rf"was given a {type(given).__name__}; a Hugging Face .*{what_to_do}"):
            what()


def test_weights_that_are_elsewhere_are_named_and_not_called_quantized(model):
    model.lm_head.weight.data = model.lm_head.weight.data.new_empty(0)
    with (
        pytest.raises(UserError, match=r"lm_head.weight is empty on this rank; whole weights were wanted"),
        attach(model),
    ):
        pytest.fail("the block must not be entered")
