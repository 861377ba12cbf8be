"""Rounding to fp8 and moving it: the nearest number, the largest for what is too large, NaN for what is a fault."""

import itertools
import math

import pytest
import torch

from cpinfer.ops.float8 import put_rows, rounded_through, take_rows

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
EXPONENTS = {torch.float8_e4m3fn: (4, 3), torch.float8_e5m2: (5, 2)}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def numbers(dtype):
    """All finite numbers of fp8 that are not negative, from its definition."""
    exponent_bits, mantissa_bits = EXPONENTS[dtype]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = [math.ldexp(m, 1 - bias - mantissa_bits) for m in range(steps)]
    for e, m in itertools.product(range(1, 2**exponent_bits), range(steps)):
        found.append(math.ldexp(steps + m, e - bias - mantissa_bits))
    return [x for x in found if x <= LARGEST[dtype]]


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_numbers_of_fp8_stay_as_they_are_and_others_become_the_nearest(dtype, wide):
    exact = torch.tensor(numbers(dtype))
    exact = torch.cat([-exact, exact]).to(wide)
    assert torch.equal(rounded_through(exact, dtype), exact)
    x = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 20).to(wide)
    found = rounded_through(x, dtype)
    assert found.dtype == wide
    distance = (x[:, None].double() - exact.double()).abs().min(dim=1).values
    torch.testing.assert_close((x.double() - found.double()).abs(), distance, rtol=0, atol=0)
    assert torch.equal(rounded_through(found, dtype), found)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_what_is_too_large_becomes_the_largest_and_what_is_not_finite_nan(dtype, wide):
    x = torch.tensor([449, -449, 500, 6e4, -6e4, math.inf, -math.inf, math.nan]).to(wide)
    found = rounded_through(x, dtype)
    assert found[5:].isnan().all()
    assert found[:5].isfinite().all() and found[3:5].tolist() == [LARGEST[dtype], -LARGEST[dtype]]
    assert dtype != torch.float8_e4m3fn or found[:3].tolist() == [448, -448, 448]


def test_rounding_leaves_its_input_alone():
    x = torch.tensor([1.01, 1e9, torch.nan])
    before = x.clone()
    rounded_through(x, torch.float8_e4m3fn)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*FP8, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_put_and_taken_bit_for_bit_whatever_their_strides(dtype):
    store = torch.zeros(6, 2, 8, dtype=dtype)[..., :5]
    rows = torch.randn(3, 2, 9)[..., 2:7].to(dtype)
    index = torch.tensor([4, 0, 2])
    put_rows(store, index, rows)
    assert torch.equal(take_rows(store, index).float(), rows.float())
    assert (store[[1, 3, 5]].float() == 0).all()
    square = torch.tensor([[0, 4], [2, 1]])
    assert torch.equal(take_rows(store, square).float(), store.float()[square])
    assert take_rows(store, torch.empty(0, dtype=torch.long)).shape == (0, 2, 5)
