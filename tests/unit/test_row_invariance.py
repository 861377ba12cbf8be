"""Logits of a model have the same bits whatever rows run beside a row, and a module that breaks this is named."""

import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from cpinfer.engine.attach import model_spec
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models.row_invariance import check_row_invariance
from cpinfer.models.runner import attached
from every_family import WITHOUT_STATES
from tiny_models import FAMILIES, TINY, make_model
from torch_threads import torch_threads


def check(model, **words):
    with attached(model, model_spec(model), 1) as runner:
        check_row_invariance(runner, **words)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", WITHOUT_STATES)
def test_rows_of_every_family_have_the_same_bits_alone_and_beside_others(family, dtype, num_threads):
    with torch_threads(num_threads):
        check(make_model(FAMILIES[family], dtype))


@pytest.mark.parametrize("family", WITHOUT_STATES)
def test_without_the_context_rows_differ(family):
    """Negative control."""
    with pytest.raises(UserError, match="deterministic logits cannot be kept"):
        check(make_model(FAMILIES[family]), around=nullcontext)


def test_in_bfloat16_rows_of_a_wider_model_agree_with_the_context_alone():
    """Of tiny ones they agree anyhow: half precision rounds the differences away. (On some processors of all.)"""
    wide = {**TINY, "hidden_size": 512, "intermediate_size": 1376, "vocab_size": 1000}
    model = make_model(LlamaConfig(**wide), torch.bfloat16)
    with torch_threads(1):
        check(model)
        try:
            check(model, around=nullcontext)
        except UserError as error:
            assert re.search(r"weight \[\d+, \d+\]\) gives a row", str(error))
        else:
            pytest.skip("this processor's products in bfloat16 agree without the context, too")


class Planted(nn.Linear):
    """A product that no context sees: its matrix is no matrix."""

    def forward(self, x):
        return torch.einsum("...k,nk->...n", x, self.weight) * (1 + 1e-3 * (x.shape[-2] > 20))


class Scaled(nn.Module):
    """Scales what its part returns by the number of rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1.5 if x.shape[-2] == 1 else 1.0)


def test_a_module_whose_rows_depend_on_others_is_named():
    model = make_model(FAMILIES["llama"])
    model.model.layers[1].mlp.up_proj = Planted(64, 96, bias=False)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj \(Planted, weight \[96, 64\]\) gives a row"):
        check(model)


def test_where_all_parts_of_a_module_agree_the_module_itself_is_named():
    model = make_model(FAMILIES["llama"])
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp \(Scaled\) gives a row"):
        check(model)


def test_without_the_context_the_first_product_is_named():
    model = make_model(FAMILIES["llama"])
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj \(Linear, weight \[64, 64\]\)"):
        check(model, around=nullcontext)


def test_a_rank_whose_rows_agree_raises_with_one_whose_rows_differ():
    """And runs the same forwards, which have collectives."""
    model, ran = make_model(FAMILIES["llama"]), []
    model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    check(model)
    num_forwards = len(ran)
    with pytest.raises(UserError, match="something outside of its modules"):
        check(model, any_rank=lambda differs: True)
    assert len(ran) == 2 * num_forwards + 2


def test_three_tensor_parallel_ranks_are_refused():
    with pytest.raises(UnsupportedError, match="more than two tensor-parallel ranks"):
        check_row_invariance(None, tp_size=3)


def test_a_check_leaves_no_hook_and_no_context():
    model = make_model(FAMILIES["llama"])
    x, weight = torch.randn(3, 512), torch.randn(512, 512)
    before = torch.nn.functional.linear(x, weight)
    check(model)
    with pytest.raises(UserError):
        check(model, around=nullcontext)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.nn.functional.linear(x, weight), before)
