"""Random numbers by counter: the published generator's, at a counter of their own, and independent along every axis."""

import hashlib
import itertools

import numpy as np
import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.random_numbers import exponentials, exponentials_of
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.errors import UserError
from cpinfer.ops import philox as random_bits
from cpinfer.ops.cpu_kernels import compiling

MASK = 2**64 - 1
# What a number is for. Each axis is neighbours: seeds, ids, samples and places are counted up.
AXES = {"seed": 4, "id": 4, "sample": 4, "place": 8, "number": 64}
PARTS = 8  # of the unit interval, on both sides of a pair
LIMIT = 103.4  # chi-square of 63 degrees of freedom is above with probability 0.001; counters are fixed


def make_request(seed=0, id="p", sample=0, place=0, **keys):
    request = SampledRequest(Prompt(0, id, keys.pop("prompt", (1,))), sample, SamplingParams(seed=seed, **keys), 100)
    request.sampled = [SampledToken(t, 0.0, 0.0) for t in range(place)]
    return request


def philox(counter, key):
    """Philox 4x64-10 by the paper's definition: four words from a counter of four and a key of two."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (high >> 64) ^ b ^ k, high & MASK, (low >> 64) ^ d ^ m, low & MASK
        k, m = (k + 0x9E3779B97F4A7C15) & MASK, (m + 0xBB67AE8584CAA73B) & MASK
    return a, b, c, d


def test_the_generator_of_these_tests_gives_the_known_answers():
    """Of kat_vectors in the authors' Random123."""
    assert philox((0,) * 4, (0, 0)) == (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    assert philox((MASK,) * 4, (MASK,) * 2) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )


def test_numbers_are_the_philox_of_their_counter():
    """Exact in every bit: text sampled once must be sampled again by later versions."""
    requests, bits = [], []
    for id in map(str, range(20)):  # about half of the keys have their highest bit set
        for seed, sample, place in ((0, 0, 0), (2**64 - 1, 3, 7)):
            key = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest())
            # numpy counts up before it draws, so that the first four are those of count 1.
            counts = [philox((1 + i, place, sample, key), (seed, 0)) for i in range(3)]
            bits.append(list(itertools.chain(*counts))[:10])
            requests.append(make_request(seed, id, sample, place))
    want = exponentials_of(np.array(bits, dtype=np.uint64))
    assert np.array_equal(exponentials(requests, 10), want)
    assert np.array_equal(exponentials(requests[::-1], 10), want[::-1])


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 200])
def test_bits_are_the_same_with_a_compiler_and_without(monkeypatch, num_rows, num):
    places = np.random.default_rng(num).integers(0, MASK, (num_rows, 4), dtype=np.uint64, endpoint=True)
    places[:1] = MASK
    try:
        compiling.compiled("philox")
    except UserError as error:
        pytest.skip(str(error))
    by_kernel = random_bits.philox(places, num)
    assert [tuple(row[:4]) for row in by_kernel.tolist()] == [
        philox((1, *counter), (key, 0))[:num] for key, *counter in places.tolist()
    ]
    monkeypatch.setattr(random_bits, "functions_of", lambda *given, **named: None)
    assert np.array_equal(random_bits.philox(places, num), by_kernel) and by_kernel.shape == (num_rows, num)


def test_without_a_compiler_nobody_asks_for_one_in_every_step(monkeypatch):
    asked = []

    def compiled(name):
        asked.append(name)
        raise UserError("no compiler")

    monkeypatch.setattr(compiling, "compiled", compiled)
    compiling.functions_of.cache_clear()
    try:
        assert exponentials([make_request()], 5).shape == exponentials([make_request()], 5).shape == (1, 5)
    finally:
        compiling.functions_of.cache_clear()
    assert asked == ["philox"]


def test_numbers_are_the_same_in_any_company_and_however_many_are_drawn():
    requests = [make_request(id=str(i), place=i % 5) for i in range(12)]
    many = exponentials(requests, 300)
    for i, request in enumerate(requests):
        assert np.array_equal(exponentials([request], 7)[0], many[i, :7])
    assert exponentials([], 7).shape == (0, 7)


def test_numbers_depend_on_nothing_else():
    one = make_request(4, "id", 2, 3)
    other = make_request(4, "id", 2, 3, prompt=(8, 8), temperature=0.3, n=9)
    other.sampled = [SampledToken(7, -1.0, -1.0)] * 3
    other.blocks = [1, 2]
    assert np.array_equal(exponentials([one], 9), exponentials([other], 9))


def test_the_ends_of_the_random_bits_give_numbers_that_are_finite_and_above_zero():
    low, high = exponentials_of(np.array([MASK, 0], dtype=np.uint64))
    assert 0 < low < 2**-52 and 36 < high < 37


def drawn(ignored=None):
    """Numbers as uniform ones, one axis for each of AXES; `ignored` is what a wrong generator does not look at."""
    *of_rows, num = (range(size) for size in AXES.values())
    requests = []
    for values in itertools.product(*of_rows):
        fields = dict(zip(AXES, values, strict=False))
        if ignored in fields:
            fields[ignored] = 0
        requests.append(make_request(**{**fields, "id": str(fields["id"])}))
    numbers = np.exp(-exponentials(requests, len(num))).reshape(*AXES.values())
    return np.broadcast_to(numbers[..., :1], numbers.shape) if ignored == "number" else numbers


def chi_square(numbers, axis):
    """Of pairs of neighbours along an axis, no number in two of them, over PARTS x PARTS cells."""
    parts = np.moveaxis((numbers * PARTS).astype(int), list(AXES).index(axis), -1)
    counts = np.bincount((parts[..., 0::2] * PARTS + parts[..., 1::2]).ravel(), minlength=PARTS**2)
    want = counts.sum() / PARTS**2
    return float(((counts - want) ** 2 / want).sum())


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_independent(axis):
    assert chi_square(drawn(), axis) < LIMIT


@pytest.mark.parametrize("axis", AXES)
def test_a_generator_that_ignores_something_would_be_seen(axis):
    """The control, each axis made wrong on purpose."""
    wrong = drawn(ignored=axis)
    assert chi_square(wrong, axis) > 10 * LIMIT


def test_no_number_is_used_twice():
    """As would be where counts of numbers ran on into those of the next place."""
    numbers = drawn()
    assert len(np.unique(numbers)) == numbers.size
