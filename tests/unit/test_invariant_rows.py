"""In the context every way in which models write products and activations gives a row its own bits."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from cpinfer.models.invariant_rows import invariant_checkpointing, invariant_rows
from cpinfer.ops.row_sizes import linear_by_rows
from tiny_models import FAMILIES, make_model

CUTS = [(0, 1), (0, 3), (5, 12), (3, 36), (39, 40)]


def rows_differ(function, num_rows=40, width=64):
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0))
    whole = function(x)
    return [cut for cut in CUTS if not torch.equal(function(x[slice(*cut)].clone()), whole[slice(*cut)])]


MATRIX, BIAS = torch.randn(64, 512), torch.randn(512)
WAYS = {
    "linear": lambda x: F.linear(x, MATRIX.t(), BIAS),
    "a module": nn.Linear(64, 512).requires_grad_(False),
    "@": lambda x: x @ MATRIX,
    "matmul": lambda x: torch.matmul(x, MATRIX),
    "mm": lambda x: x.mm(MATRIX),
    "addmm": lambda x: torch.addmm(BIAS, x, MATRIX),
    "Conv1D": Conv1D(512, 64).requires_grad_(False),
    "silu": lambda x: F.silu(x[:, :50].contiguous()),
    "a gate": lambda x: x[..., :50] * torch.sigmoid(x[..., :50] * 1.702),
    "a power": lambda x: x[:, :50].abs() ** 0.37,
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_have_their_own_bits(way):
    function = WAYS[way]
    with invariant_rows():
        assert rows_differ(function) == []
    assert rows_differ(function), "negative control: they differ without the context"


def test_what_is_no_product_with_a_weight_is_torchs_own():
    q, k, x = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 5), torch.randn(7)
    with invariant_rows():
        found = [q @ k, x @ x, torch.addmm(torch.ones(3, 3), torch.ones(3, 2), torch.ones(2, 3), beta=2)]
        integers = torch.arange(3).pow(2)
    wanted = [q @ k, x @ x, torch.addmm(torch.ones(3, 3), torch.ones(3, 2), torch.ones(2, 3), beta=2)]
    assert all(map(torch.equal, found, wanted)) and integers.tolist() == [0, 1, 4]


def test_code_that_sees_to_its_rows_itself_may_step_out():
    x, weight = torch.randn(1, 64), torch.randn(512, 64)
    with invariant_rows():
        inside = F.linear(x, weight)
        with torch._C.DisableTorchFunction():
            outside = F.linear(x, weight)
        again = F.linear(x, weight)
    assert torch.equal(inside, linear_by_rows(x, weight)) and torch.equal(inside, again)
    assert torch.equal(outside, F.linear(x, weight)) and not torch.equal(outside, inside)


def test_a_name_that_somebody_replaced_is_no_way_around_it(monkeypatch):
    """As DeepSpeed does where it gathers parameters."""
    layer, x = nn.Linear(64, 512), torch.randn(3, 64)
    with invariant_rows():
        wanted = layer(x)
    monkeypatch.setattr(F, "linear", lambda input, weight, bias: input.matmul(weight.t()) + bias)
    with invariant_rows():
        assert torch.equal(layer(x), wanted)


MOE = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("family", MOE)
def test_experts_give_a_token_its_own_bits_and_values(family, implementation):
    """Whichever expert it shares with whom."""
    model = make_model(copy.deepcopy(FAMILIES[family]))
    model.set_experts_implementation(implementation)
    experts = model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(1)
    x, chosen = torch.randn(40, 64, generator=generator), torch.rand(40, 4, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(40, 2, generator=generator)
    with invariant_rows():
        whole = experts(x, chosen, weights)
        parts = [experts(*(t[slice(*cut)].clone() for t in (x, chosen, weights))) for cut in CUTS]
    assert all(torch.equal(part, whole[slice(*cut)]) for part, cut in zip(parts, CUTS, strict=True))
    torch.testing.assert_close(whole, experts(x, chosen, weights))
    parts = [experts(*(t[slice(*cut)].clone() for t in (x, chosen, weights))) for cut in CUTS]
    assert not all(torch.equal(part, whole[slice(*cut)]) for part, cut in zip(parts, CUTS, strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_a_training_forward_has_the_gradients_of_the_models_own(family):
    model, tokens = make_model(FAMILIES[family]), torch.arange(40).view(2, 20)
    grads = []
    for context in (invariant_rows(), torch._C.DisableTorchFunction()):
        model.zero_grad()
        with context:
            model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    norms = [torch.cat([g.flatten() for g in side]) for side in grads]
    assert (norms[0] - norms[1]).norm() <= 1e-4 * norms[1].norm()


def gradients(model, checkpointing):
    tokens = torch.arange(38).view(2, 19)
    with invariant_rows(), checkpointing:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_what_checkpointing_computes_again_has_the_same_bits():
    plain, checkpointed = make_model(FAMILIES["llama"]).train(), make_model(FAMILIES["llama"]).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    before = [vars(layer)["_gradient_checkpointing_func"] for layer in checkpointed.model.layers]
    found = gradients(checkpointed, invariant_checkpointing(checkpointed))
    assert torch.equal(found, gradients(plain, invariant_checkpointing(plain)))
    assert before == [vars(layer)["_gradient_checkpointing_func"] for layer in checkpointed.model.layers]
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):  # negative control
        gradients(checkpointed, nullcontext())


def test_a_block_inside_a_block_is_the_same_block():
    x, layer = torch.randn(3, 64), nn.Linear(64, 512)
    with invariant_rows():
        once = layer(x)
        with invariant_rows():
            assert torch.equal(layer(x), once)
        assert torch.equal(layer(x), once)
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
