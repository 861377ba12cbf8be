"""Tokens from logits, by compiled kernels and by their definition: drawn as it says, likely as float64 has it."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from cpinfer.errors import UserError
from cpinfer.ops import draws
from cpinfer.ops.cpu_kernels import compiling
from cpinfer.ops.draws import GROUP_SIZE, draw, likeliest, logprobs_of, num_random, top_logprobs

VOCABS = (1, 5, GROUP_SIZE - 1, GROUP_SIZE, GROUP_SIZE + 1, 1000, 40_000)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Each test runs by the kernels, and by their definition."""
    if request.param == "torch":
        monkeypatch.setattr(draws, "functions_of", lambda *given, **named: None)
    else:
        try:
            compiling.compiled("draws")
        except UserError as error:
            pytest.skip(str(error))
    return request.param


def make_scores(num_rows, vocab, spread=3.0):
    """Logits, of which the first row can only be one of its last tokens."""
    scores = spread * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab))
    scores[:1, : vocab // 2] = -torch.inf
    return scores


def make_numbers(num_rows, vocab):
    return torch.from_numpy(np.random.default_rng(vocab).exponential(size=(num_rows, num_random(vocab))))


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_are_those_of_float64(way, vocab, spread):
    scores, numbers = make_scores(9, vocab, spread), make_numbers(9, vocab)
    tokens, logprobs = draw(scores, numbers)
    exact = torch.log_softmax(scores.double(), dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert tokens.shape == logprobs.shape == (9,) and torch.isfinite(exact).all(), "what cannot be is not drawn"
    # torch's own sum is off by a few units in the last place of the logsumexp.
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-6 if way == "compiled" else 1e-5)
    assert torch.equal(logprobs_of(scores, tokens), logprobs)


@pytest.mark.parametrize("vocab", VOCABS)
def test_kernels_draw_what_their_definition_draws(way, vocab):
    scores, numbers = make_scores(64, vocab), make_numbers(64, vocab)
    expected = draws._drawn(scores, numbers)[0]
    assert torch.equal(draw(scores, numbers)[0], expected)
    assert vocab == 1 or not torch.equal(draw(scores, numbers.flip(0))[0], expected), "the numbers decide"
    assert torch.equal(likeliest(scores), scores.argmax(dim=-1))


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_likeliest_have_the_logprobs_that_they_have_as_tokens(way, vocab):
    scores = make_scores(9, vocab)
    ids, logprobs = top_logprobs(scores, min(3, vocab))
    assert torch.equal(ids[:, 0], likeliest(scores)) and (logprobs.diff(dim=1) <= 0).all()
    for place in range(ids.shape[1]):
        assert torch.equal(logprobs[:, place], logprobs_of(scores, ids[:, place]))


def test_of_equal_ones_the_first(way):
    scores = torch.zeros(1, 3 * GROUP_SIZE)
    numbers = torch.ones(1, num_random(3 * GROUP_SIZE), dtype=torch.float64)
    assert draw(scores, numbers)[0].tolist() == likeliest(scores).tolist() == [0]
    scores[0, : GROUP_SIZE + 2] = -torch.inf
    numbers[0, GROUP_SIZE + 1] = 0.5  # the second group, in which two tokens are none
    assert draw(scores, numbers)[0].tolist() == likeliest(scores).tolist() == [GROUP_SIZE + 2]


def test_rows_are_what_they_are_alone(way):
    """Whatever is beside them, and however many threads there are."""
    scores, numbers = make_scores(7, 1000), make_numbers(7, 1000)
    tokens, logprobs = draw(scores, numbers)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threaded = draw(scores, numbers)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threaded[0], tokens)
    if way == "torch":  # whose sums know how many threads there are
        return
    assert torch.equal(threaded[1], logprobs)
    for i in range(7):
        token, logprob = draw(scores[i : i + 1], numbers[i : i + 1])
        assert (token[0], logprob[0]) == (tokens[i], logprobs[i])


def test_rows_of_any_strides(way):
    scores, numbers = make_scores(5, 300), make_numbers(5, 300)
    expected = draw(scores, numbers)
    wide = torch.cat([scores, torch.full((5, 9), 1e4)], dim=1)[:, :300]
    for same in (wide, scores.t().contiguous().t()):
        tokens, logprobs = draw(same, numbers)
        assert torch.equal(tokens, expected[0]) and torch.equal(likeliest(same), likeliest(scores))
        torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(logprobs_of(same, tokens), expected[1], rtol=0, atol=1e-5)


@pytest.fixture
def other_defaults():
    """Those that a job may have set for tensors of its own."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_defaults_that_a_job_has_set_change_nothing(way, request):
    scores, numbers = make_scores(9, 300), make_numbers(9, 300)
    expected = (*draw(scores, numbers), likeliest(scores), *top_logprobs(scores, 3))
    request.getfixturevalue("other_defaults")
    found = (*draw(scores, numbers), likeliest(scores), *top_logprobs(scores, 3))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    assert torch.equal(logprobs_of(scores, found[0]), expected[1])


def test_no_rows(way):
    scores = torch.zeros(0, 50)
    tokens, logprobs = draw(scores, torch.zeros(0, num_random(50), dtype=torch.float64))
    assert tokens.shape == logprobs.shape == likeliest(scores).shape == logprobs_of(scores, tokens).shape == (0,)
    assert [x.shape for x in top_logprobs(scores, 4)] == [(0, 4)] * 2


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_no_logits_give_some_token(way, fault):
    scores, numbers = make_scores(3, 200), make_numbers(3, 200)
    expected = draw(scores, numbers)
    scores[1] = fault
    scores[1, 5] = torch.nan if fault == torch.nan else scores[1, 5]
    tokens, logprobs = draw(scores, numbers)
    assert 0 <= tokens[1] < 200 and 0 <= likeliest(scores)[1] < 200
    others = torch.tensor([0, 2])
    assert torch.equal(tokens[others], expected[0][others]) and torch.equal(logprobs[others], expected[1][others])


def test_what_does_not_fit_is_refused_before_memory_is_read(way):
    scores = make_scores(2, 200)
    with pytest.raises((IndexError, RuntimeError)):
        logprobs_of(scores, torch.tensor([0, 200]))
    if way == "compiled":
        with pytest.raises(IndexError, match=r"1 token\(s\) are outside the 200 of the logits"):
            logprobs_of(scores, torch.tensor([-1, 0]))
        for numbers in (make_numbers(2, 200)[:1], make_numbers(2, 200)[:, 1:], make_numbers(2, 200).float()):
            with pytest.raises(ValueError, match="random numbers are"):
                draw(scores, numbers)


@pytest.mark.parametrize("registers", ["LANES = 4, HELD = 2", "LANES = 8, HELD = 2"])
@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_processors_of_other_registers_have_the_same_bits(way, registers, monkeypatch, tmp_path):
    scores, numbers = make_scores(9, 1000), make_numbers(9, 1000)
    expected = draw(scores, numbers)
    folder = Path(compiling.__file__).parent
    header = (folder / "lanes.h").read_text()
    (own,) = {line for line in header.splitlines() if "LANES = 16" in line}
    for line in {line for line in header.splitlines() if "constexpr int LANES" in line}:
        header = header.replace(line, f"constexpr int {registers};")
    assert own not in header
    source = (folder / "draws.cpp").read_text().replace('#include "lanes.h"', header)
    file, library = tmp_path / "other.cpp", tmp_path / "other.so"
    file.write_text(source)
    subprocess.run(["c++", *compiling.FLAGS, str(file), "-o", str(library)], check=True, timeout=100)
    other = compiling.typed(ctypes.CDLL(str(library)), **draws.ARGUMENTS)
    monkeypatch.setattr(draws, "functions_of", lambda *given, **named: other)
    assert all(torch.equal(a, b) for a, b in zip(draw(scores, numbers), expected, strict=True))
