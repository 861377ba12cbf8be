"""What stands around a causal LM is taken away, and what is none is refused by name."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from cpinfer.engine.attach import attach
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models.wrappers import unwrapped, without_replication
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
