"""Products give a row the same bits whatever stands beside it, and the gradients of `linear`."""

import pytest
import torch
from torch.nn import functional as F

from cpinfer.ops import row_sizes as module
from cpinfer.ops.row_sizes import CANDIDATES, ProductKind, linear_by_rows, pieces, row_sizes
from torch_threads import torch_threads

SHAPES = [(512, 512), (8, 64), (11, 30), (1, 55), (96, 50), (512, 1376), (1376, 512)]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def cancelling(num_rows, weight):
    """Rows whose product with `weight`, of pairs of equal columns, is what rounding leaves: any other order shows."""
    half = torch.randn(num_rows, weight.shape[1] // 2, generator=torch.Generator().manual_seed(1))
    return torch.cat([half, -half], dim=1).to(weight.dtype)


def a_weight(shape, dtype, is_transposed=False):
    N, K = shape
    half = torch.randn(N, K // 2, generator=torch.Generator().manual_seed(2))
    weight = torch.cat([half, half], dim=1).to(dtype)
    return weight.t().contiguous().t() if is_transposed else weight


@pytest.fixture(params=[1, 2])
def num_threads(request):
    with torch_threads(request.param):
        yield request.param


def differing(product, rows):
    """Numbers of rows, and places, at which `product` gives rows other bits than all of them have at once."""
    whole = product(rows)
    cuts = [(0, n) for n in (1, 2, 7, 16, 17, 33, 64, 100, 129, 300)] + [(5, 6), (13, 40), (299, 300), (1, 258)]
    return [cut for cut in cuts if not torch.equal(product(rows[slice(*cut)]), whole[slice(*cut)])]


@BOTH
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_any_number_of_rows_at_any_place(shape, dtype, is_transposed, num_threads):
    weight = a_weight(shape, dtype, is_transposed)
    rows = cancelling(300, weight)
    assert differing(lambda x: linear_by_rows(x, weight), rows) == []


@BOTH
def test_the_products_of_torch_differ(dtype):
    """Negative control. Of which shapes depends on the processor."""
    weights = [a_weight(shape, dtype) for shape in SHAPES]
    assert any(differing(lambda x, w=w: F.linear(x, w), cancelling(300, w)) for w in weights)


@BOTH
def test_sizes_that_do_not_agree_would_show(dtype, monkeypatch):
    """Negative control: products of one row, where there is one, and of all candidates."""
    monkeypatch.setattr(module, "row_sizes", lambda kind: (1, *CANDIDATES))
    weight = a_weight((512, 1376), dtype)
    assert differing(lambda x: linear_by_rows(x, weight), cancelling(300, weight))


@pytest.mark.parametrize("shape", [(11, 30), (3, 30), (1, 7)], ids=str)
def test_rows_that_no_vector_fits_have_the_same_bits_wherever_they_begin(shape):
    weight = a_weight(shape, torch.float32)
    rows = cancelling(300, weight)
    wanted = linear_by_rows(rows, weight)
    for by in (1, 2, 3, 5):
        moved = torch.zeros(rows.numel() + by)[by:].view(rows.shape).copy_(rows)
        assert torch.equal(linear_by_rows(moved, weight), wanted)


@BOTH
def test_a_row_has_the_same_bits_however_it_lies_in_memory(dtype):
    weight = a_weight((512, 512), dtype)
    rows = cancelling(40, weight)
    wanted = linear_by_rows(rows, weight)
    wide = torch.zeros(40, 1027, dtype=dtype)
    wide[:, 3:515] = rows
    for x in (wide[:, 3:515], rows.t().contiguous().t(), rows.view(2, 20, 512), rows.repeat(2, 1)[40:]):
        assert torch.equal(linear_by_rows(x, weight).view(40, 512), wanted)
    spread = torch.zeros(512, 1024, dtype=dtype)
    spread[:, ::2] = weight
    assert torch.equal(linear_by_rows(rows, spread[:, ::2]), wanted)


def signs(*shape):
    """Numbers of which sums and products are exact in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).sign()


@BOTH
def test_it_is_linear_but_for_rounding_and_takes_a_bias_and_no_rows(dtype):
    x, weight, bias = (signs(*shape).to(dtype) for shape in ((2, 35, 50), (24, 50), (24,)))
    assert torch.equal(linear_by_rows(x, weight, bias), F.linear(x, weight, bias))
    assert linear_by_rows(x[:, :0], weight, bias).shape == (2, 0, 24)
    assert linear_by_rows(x[0, 0], weight).shape == (24,)
    assert torch.equal(linear_by_rows(x[..., :0], weight[:, :0], bias), bias.expand(2, 35, 24)), "an empty shard"


@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_gradients_are_those_of_linear(num_rows):
    x, weight, bias = signs(num_rows, 50), signs(24, 50), signs(24)
    grads = []
    for product in (linear_by_rows, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        (product(*leaves) ** 2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 50, requires_grad=True), torch.randn(24, 50)
    linear_by_rows(x, weight).sum().backward()
    assert weight.grad is None and x.grad is not None


def test_autocast_casts_all_three():
    x, weight, bias = torch.randn(3, 50), torch.randn(24, 50), torch.randn(24)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_by_rows(x, weight, bias)
    assert torch.equal(found, linear_by_rows(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@pytest.mark.parametrize("sizes", [(8,), (1,), (16, 32, 64), (8, 512, 1024), CANDIDATES])
def test_pieces_hold_all_rows_and_pad_the_last_alone(sizes):
    for n in range(1, 2100, 7):
        cut = pieces(n, sizes)
        assert set(cut) <= set(sizes) and sum(cut) >= n > sum(cut[:-1])


def test_sizes_are_the_same_on_every_rank_and_tried_once():
    kind = ProductKind((96, 50), False, torch.bfloat16, torch.device("cpu"), torch.get_num_threads())
    found = row_sizes(kind)
    assert row_sizes(kind) is found
    row_sizes.cache_clear()
    assert row_sizes(kind) == found


def test_where_no_size_agrees_with_itself_rows_run_alone(monkeypatch):
    monkeypatch.setattr(module, "_outputs", lambda *_: None)
    assert row_sizes.__wrapped__(ProductKind.of(torch.randn(8, 8))) == (1,)
