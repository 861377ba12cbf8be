"""Functions of single numbers give a number the same bits at any place of a tensor of any size."""

import pytest
import torch
from torch.nn import functional as F

from cpinfer.ops.row_pointwise import pointwise_by_rows
from torch_threads import torch_threads

FUNCTIONS = [F.silu, F.gelu, torch.sigmoid, torch.tanh, torch.exp, F.softplus, torch.cos, torch.rsqrt]


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    with torch_threads(request.param):
        yield request.param


def differing(function, dtype):
    found = []
    for width in (1, 8, 50, 96, 1000):
        x = (3 * torch.rand(700, width, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)
        whole = function(x)
        cuts = [(i, i + 1) for i in range(0, 700, 97)] + [(0, 3), (5, 12), (1, 101), (1, 690)]
        found += [(width, cut) for cut in cuts if not torch.equal(function(x[slice(*cut)].clone()), whole[slice(*cut)])]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_numbers_have_the_same_bits_in_any_number_of_rows(function, dtype, num_threads):
    assert differing(lambda x: pointwise_by_rows(function, x), dtype) == []


@pytest.mark.parametrize("function, dtype", [(F.silu, torch.float32), (torch.rsqrt, torch.bfloat16)])
def test_the_functions_of_torch_differ(function, dtype):
    """Negative control."""
    assert differing(function, dtype)


def test_values_shapes_and_gradients_are_those_of_the_function():
    for x in (torch.randn(3, 50), torch.randn(2, 3, 64).chunk(2, dim=-1)[0], torch.randn(4, 0), torch.tensor(1.5)):
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = pointwise_by_rows(F.gelu, own, approximate="tanh"), F.gelu(other, approximate="tanh")
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous()
        found.sum().backward(), wanted.sum().backward()
        torch.testing.assert_close(own.grad, other.grad)
