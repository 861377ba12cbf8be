"""Arithmetic, comparisons and conversions of the interpreter against numpy's, on numbers at the ends of their types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from interpreted_cuda.build import compiler
from interpreted_cuda.ptx_texts import of_each_thread

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler, which builds the interpreter")

DTYPES = {
    **{f"{kind}{size}": np.dtype(f"{kind.replace('s', 'i')}{size // 8}") for kind in "us" for size in (16, 32, 64)},
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "f16": np.dtype("f2"),
}


def ends(dtype: np.dtype[Any]) -> NDArray[Any]:
    info = np.iinfo(dtype)
    return np.array([0, 1, 2, 3, 7, 100, info.max, info.max - 1, info.min, info.min + 1, info.max // 3], dtype=dtype)


def whole_pairs(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    values = ends(DTYPES[name])
    a, b = np.meshgrid(values, values)
    return a.ravel().copy(), b.ravel().copy()


def floats(name: str, count: int = 96) -> list[NDArray[Any]]:
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 6e4, 1e-3, 3.0])
    some = [np.concatenate([rng.permutation(special), rng.normal(size=count) * 4]) for _ in range(3)]
    return [x.astype(DTYPES[name]) for x in some]


def quotient(a: int, b: int) -> int:
    return (1 if (a < 0) == (b < 0) else -1) * (abs(a) // abs(b))


WHOLE: dict[str, Callable[..., NDArray[Any]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "rem": np.fmod,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_wrap_at_the_ends_of_their_type(name: str, kind: str) -> None:
    a, b = whole_pairs(kind)
    if name == "rem":
        kept = (b != 0) & ((b != -1) if kind[0] == "s" else True)
        a, b = a[kept], b[kept]
    with np.errstate(over="ignore"):
        want = WHOLE[name](a, b)
    np.testing.assert_array_equal(of_each_thread(f"{name}.{kind} d, a, b;", a, b, out=a.dtype), want)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_quotients_are_cut_towards_zero(kind: str) -> None:
    a, b = whole_pairs(kind)
    kept = (b != 0) & ((b != -1) if kind[0] == "s" else True)
    a, b = a[kept], b[kept]
    want = [quotient(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    found = of_each_thread(f"div.{kind} d, a, b;", a, b, out=a.dtype)
    assert found.tolist() == want


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_products_have_their_upper_half_too(kind: str) -> None:
    a, b = whole_pairs(kind)
    width = 8 * a.dtype.itemsize
    exact = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert of_each_thread(f"mul.hi.{kind} d, a, b;", a, b, out=a.dtype).tolist() == [x >> width for x in exact]
    if width == 32:
        wide = np.array(exact, dtype=f"{kind[0].replace('s', 'i')}8")
        np.testing.assert_array_equal(of_each_thread(f"mul.wide.{kind} d, a, b;", a, b, out=wide.dtype), wide)
        sums = wide + np.arange(len(wide), dtype=wide.dtype)
        c = np.arange(len(wide), dtype=wide.dtype)
        np.testing.assert_array_equal(of_each_thread(f"mad.wide.{kind} d, a, b, c;", a, b, c, out=wide.dtype), sums)


@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
@pytest.mark.parametrize("name", ["add.rn", "sub", "mul", "div.rn", "min", "max", "fma.rn", "neg", "abs"])
def test_floating_point_rounds_once(name: str, kind: str) -> None:
    if name == "div.rn" and kind == "f16":
        return  # there is none
    a, b, c = floats(kind)
    word = name.partition(".")[0]
    wide = [torch.from_numpy(x).double() for x in (a, b, c)]
    # Of products and sums of float32 in double, one rounding is right; of fma in double, libm's own is taken.
    if word == "fma" and kind == "f64":
        want = torch.addcmul(wide[2], wide[0], wide[1])  # compared loosely below
    else:
        by = {"add": lambda: wide[0] + wide[1], "sub": lambda: wide[0] - wide[1], "mul": lambda: wide[0] * wide[1]}
        by |= {"div": lambda: wide[0] / wide[1], "fma": lambda: wide[0] * wide[1] + wide[2]}
        by |= {"min": lambda: torch.fmin(*wide[:2]), "max": lambda: torch.fmax(*wide[:2])}
        by |= {"neg": lambda: -wide[0], "abs": lambda: wide[0].abs()}
        want = by[word]()
    operands = {"neg": "a", "abs": "a", "fma": "a, b, c"}.get(word, "a, b")
    found = of_each_thread(f"{name}.{kind} d, {operands};", a, b, c, out=a.dtype)
    tolerance = 1e-15 if kind == "f64" and word == "fma" else 0
    want_here = want.numpy().astype(a.dtype)
    np.testing.assert_allclose(found, want_here, rtol=1e-7 if word == "fma" and kind == "f32" else tolerance, atol=0)


def test_pairs_of_halves_are_two_numbers() -> None:
    a, b, c = (x[: len(x) // 2 * 2] for x in floats("f16"))
    packed = [x.view(np.uint32) for x in (a, b, c)]
    for name, operands, want in (
        ("add.f16x2", "a, b", a + b),
        ("mul.f16x2", "a, b", a * b),
        ("max.NaN.f16x2", "a, b", np.maximum(a, b)),
        ("max.f16x2", "a, b", np.fmax(a, b)),
        ("fma.rn.f16x2", "a, b, c", (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype("f2")),
    ):
        found = of_each_thread(f"{name} d, {operands};", *packed, out=np.uint32).view(np.float16)
        np.testing.assert_array_equal(found, want)
    bits = [torch.from_numpy(x.astype("f4")).bfloat16() for x in (a, b)]
    given = [x.view(torch.int16).numpy().view(np.uint32) for x in bits]
    found = torch.from_numpy(of_each_thread("mul.bf16x2 d, a, b;", *given, out=np.uint32).view(np.int16))
    torch.testing.assert_close(found.view(torch.bfloat16), bits[0] * bits[1], rtol=0, atol=0, equal_nan=True)


def test_ftz_takes_small_numbers_for_zero_and_sat_keeps_to_zero_and_one() -> None:
    a = np.array([1e-40, -1e-40, 1e-38, 0.5, 2.0, -3.0, np.nan], dtype="f4")
    b = np.array([1.0, 1.0, 0.01, 0.25, 0.25, 1.0, 1.0], dtype="f4")
    np.testing.assert_array_equal(of_each_thread("mul.f32 d, a, b;", a, b, out="f4"), a * b)
    want = np.where(np.abs(a * b) < np.finfo("f4").tiny, np.copysign(0, a), a * b).astype("f4")
    found = of_each_thread("mul.ftz.f32 d, a, b;", a, b, out="f4")
    np.testing.assert_array_equal(found, want)
    assert np.signbit(found[1])
    saturated = of_each_thread("add.sat.f32 d, a, b;", a, b, out="f4")
    np.testing.assert_array_equal(saturated, np.nan_to_num(np.clip(a + b, 0, 1)))


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("rcp.approx.f32", np.reciprocal),
        ("sqrt.rn.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh),
        ("rcp.rn.f64", np.reciprocal),
        ("ex2.approx.f16", np.exp2),
    ],
)
def test_functions_are_those_of_the_host(name: str, want: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    dtype = DTYPES[name.rpartition(".")[2]]
    a = np.array([0.25, 1.0, 2.0, 3.5, 10.0, 0.1], dtype=dtype)
    found = of_each_thread(f"{name} d, a;", a, out=dtype)
    np.testing.assert_allclose(found, want(a.astype("f8")), rtol=1e-3 if dtype == np.float16 else 3e-7)


# --- bits


def test_bits_are_shifted_moved_and_counted() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2**32, 64, dtype=np.uint32) for _ in range(2))
    by = np.arange(64, dtype=np.uint32)
    wide, others = a.tolist(), b.tolist()
    for text, want in (
        ("and.b32 d, a, b;", a & b),
        ("or.b32 d, a, b;", a | b),
        ("xor.b32 d, a, b;", a ^ b),
        ("not.b32 d, a;", ~a),
        ("shl.b32 d, a, c;", [(x << n) % 2**32 for n, x in enumerate(wide)]),
        ("shr.u32 d, a, c;", [x >> n for n, x in enumerate(wide)]),
        ("clz.b32 d, a;", [32 - x.bit_length() for x in wide]),
        ("popc.b32 d, a;", [x.bit_count() for x in wide]),
        ("brev.b32 d, a;", [int(f"{x:032b}"[::-1], 2) for x in wide]),
        ("shf.l.wrap.b32 d, a, b, 5;", [((y << 5) | (x >> 27)) % 2**32 for x, y in zip(wide, others, strict=True)]),
        ("shf.r.clamp.b32 d, a, b, 40;", b),
        ("bfe.u32 d, a, 4, 7;", (a >> 4) & 127),
        ("bfe.u32 d, a, 30, 7;", a >> 30),
        ("bfi.b32 d, a, b, 8, 4;", (b & ~np.uint32(0xF00)) | ((a & 15) << 8)),
        ("lop3.b32 d, a, b, c, 0xCA;", (a & b) | (~a & by)),
        ("prmt.b32 d, a, b, 0x5410;", (a & 0xFFFF) | (b << 16)),
        ("prmt.b32 d, a, b, 0x3276;", [_permuted(x, y, (6, 7, 2, 3)) for x, y in zip(wide, others, strict=True)]),
    ):
        found = of_each_thread(text, a, b, by, out=np.uint32)
        np.testing.assert_array_equal(found, np.array(want).astype(np.uint32), err_msg=text)


def _permuted(a: int, b: int, places: tuple[int, ...]) -> int:
    taken = (a.to_bytes(4, "little") + b.to_bytes(4, "little"))[:8]
    return int.from_bytes(bytes(taken[place] for place in places), "little")


def test_signed_numbers_keep_their_sign_when_bits_are_taken() -> None:
    a = np.array([-1, -128, 127, 1 << 30, -(1 << 31), 0x7F0], dtype=np.int32)
    np.testing.assert_array_equal(of_each_thread("shr.s32 d, a, 3;", a, out=np.int32), a >> 3)
    np.testing.assert_array_equal(of_each_thread("shr.s32 d, a, 99;", a, out=np.int32), a >> 31)
    want = ((a >> 4 & 0xFF) ^ 0x80) - 0x80
    np.testing.assert_array_equal(of_each_thread("bfe.s32 d, a, 4, 8;", a, out=np.int32), want)
    np.testing.assert_array_equal(of_each_thread("bfe.s32 d, a, 28, 9;", a, out=np.int32), a >> 28)
    # prmt with the highest bit of a place set: the sign of the byte, eight times
    signs = of_each_thread("prmt.b32 d, a, a, 0xBBBB;", a, out=np.int32)
    np.testing.assert_array_equal(signs, a >> 31)


# --- comparisons


@pytest.mark.parametrize("kind", ["u32", "s32", "s64", "u16", "f32", "f64", "f16"])
@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_are_those_of_the_type(name: str, kind: str) -> None:
    a, b = floats(kind)[:2] if kind[0] == "f" else whole_pairs(kind)
    by = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
    want = getattr(np, by[name])(a, b) & ~(np.isnan(a) | np.isnan(b))
    ones, others = (np.full(len(a), x, dtype=np.uint32) for x in (7, 9))
    text = f"setp.{name}.{kind} p, a, b; selp.b32 d, c, e, p;"
    np.testing.assert_array_equal(of_each_thread(text, a, b, ones, others, out=np.uint32), np.where(want, 7, 9))


def test_comparisons_that_hold_of_nan_and_of_two_conditions() -> None:
    a, b = (x.astype("f4") for x in floats("f32")[:2])
    nan = np.isnan(a) | np.isnan(b)
    for text, want in (
        ("setp.ltu.f32 p, a, b;", (a < b) | nan),
        ("setp.neu.f32 p, a, b;", (a != b) | nan),
        ("setp.nan.f32 p, a, b;", nan),
        ("setp.gt.f32 p, a, 0f00000000; setp.lt.and.f32 p, a, b, p;", (a > 0) & (a < b)),
        ("setp.gt.f32 p, a, 0f00000000; setp.lt.and.f32 p, a, b, !p;", ~(a > 0) & (a < b)),
        ("setp.gt.f32 p, a, 0f00000000; setp.lt.or.f32 q|p, a, b, p;", (a > 0) | ~(a < b)),
        ("setp.gt.f32 p, a, b; not.pred p, p;", ~(a > b)),
    ):
        found = of_each_thread(f"{text} selp.u32 d, 1, 0, p;", a, b, out=np.uint32)
        np.testing.assert_array_equal(found, want, err_msg=text)
    np.testing.assert_array_equal(of_each_thread("set.lt.u32.f32 d, a, b;", a, b, out="i4"), np.where(a < b, -1, 0))
    np.testing.assert_array_equal(of_each_thread("set.lt.f32.f32 d, a, b;", a, b, out="f4"), a < b)


# --- conversions


def test_whole_numbers_are_widened_by_their_sign_and_cut() -> None:
    a = np.array([-1, 5, -32768, 32767, 200], dtype=np.int16)
    for text, out, want in (
        ("cvt.s32.s16 d, a;", np.int32, a),
        ("cvt.u32.u16 d, a;", np.uint32, a.view(np.uint16)),
        ("cvt.u64.u16 d, a;", np.uint64, a.view(np.uint16)),
        ("cvt.s32.s8 d, a;", np.int32, a.astype(np.int8)),
        ("cvt.sat.u8.s16 d, a;", np.uint8, np.clip(a, 0, 255)),
        ("cvt.sat.s8.s16 d, a;", np.int8, np.clip(a, -128, 127)),
    ):
        np.testing.assert_array_equal(of_each_thread(text, a, out=out), want.astype(out), err_msg=text)


def test_floating_point_becomes_whole_numbers_as_it_is_told_to() -> None:
    a = np.array([1.5, 2.5, -1.5, -0.4, 3e9, -3e9, 1e20, np.nan, 0.999], dtype="f4")
    for way, rounded in (("rni", np.rint(a)), ("rzi", np.trunc(a)), ("rmi", np.floor(a)), ("rpi", np.ceil(a))):
        for kind, dtype in (("s32", np.int32), ("u32", np.uint32), ("u8", np.uint8)):
            info = np.iinfo(dtype)
            want = np.nan_to_num(np.clip(rounded.astype("f8"), info.min, info.max)).astype(dtype)
            found = of_each_thread(f"cvt.{way}.{kind}.f32 d, a;", a, out=dtype)
            np.testing.assert_array_equal(found, want, err_msg=f"{way} {kind}")
        np.testing.assert_array_equal(of_each_thread(f"cvt.{way}.f32.f32 d, a;", a, out="f4"), rounded)


def test_floating_point_is_narrowed_with_one_rounding() -> None:
    rng = np.random.default_rng(3)
    # Beside ties of half precision, by less than float32 can tell.
    ties = np.float64(1 + 2**-11) + np.array([0, 2**-40, -(2**-40)])
    wide = np.concatenate([rng.normal(size=200), ties, [1e-30, 1e30, np.inf, -np.inf, 65519.9, 6e-8]])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(of_each_thread("cvt.rn.f16.f64 d, a;", wide, out="f2"), wide.astype("f2"))
    single = wide.astype("f4")
    np.testing.assert_array_equal(of_each_thread("cvt.rn.f32.f64 d, a;", wide, out="f4"), single)
    bfloat = torch.from_numpy(single).bfloat16()
    found = torch.from_numpy(of_each_thread("cvt.rn.bf16.f32 d, a;", single, out=np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(found, bfloat, rtol=0, atol=0)
    cut = torch.from_numpy(of_each_thread("cvt.rz.bf16.f32 d, a;", single, out=np.int16)).view(torch.bfloat16)
    kept = torch.from_numpy((single.view(np.uint32) & np.uint32(0xFFFF0000)).view("f4"))
    torch.testing.assert_close(cut.float(), kept, rtol=0, atol=0)
    widened = of_each_thread("cvt.f32.bf16 d, a;", bfloat.view(torch.int16).numpy(), out="f4")
    np.testing.assert_array_equal(widened, bfloat.float().numpy())


def test_two_numbers_are_packed_with_the_first_above() -> None:
    a, b = (np.random.default_rng(i).normal(size=50).astype("f4") for i in range(2))
    with_halves = of_each_thread("cvt.rn.f16x2.f32 d, a, b;", a, b, out=np.uint32).view("f2").reshape(-1, 2)
    np.testing.assert_array_equal(with_halves, np.stack([b, a], axis=1).astype("f2"))
    packed = of_each_thread("cvt.rn.bf16x2.f32 d, a, b;", a, b, out=np.uint32).view(np.int16).reshape(-1, 2)
    want = torch.from_numpy(np.stack([b, a], axis=1)).bfloat16()
    torch.testing.assert_close(torch.from_numpy(packed).view(torch.bfloat16), want, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)])
def test_eight_bits_are_those_of_torch(kind: str, dtype: torch.dtype) -> None:
    every = np.arange(2**16, dtype=np.uint16)[::37].copy()[:1000]
    numbers = torch.from_numpy(every.view(np.uint8)).view(dtype)
    found = of_each_thread(f"cvt.rn.f16x2.{kind} d, a;", every, out=np.uint32).view("f2")
    np.testing.assert_array_equal(found, numbers.half().numpy())
    rng = np.random.default_rng(0)
    a, b = (np.concatenate([rng.normal(size=300) * 50, [0, 1e-9, 0.01, 300.0]]).astype("f4") for _ in range(2))
    made = of_each_thread(f"cvt.rn.satfinite.{kind}.f32 d, a, b;", a, b, out=np.uint16).view(np.uint8).reshape(-1, 2)
    want = torch.from_numpy(np.stack([b, a], axis=1)).to(dtype).view(torch.uint8)
    np.testing.assert_array_equal(made, want.numpy())
