"""Mismatch of logprobs: against sums written out by hand, and nothing that goes wrong may vanish in a mean or a max."""

import math

import pytest

from cpinfer.colocate.mismatch import Mismatch

NAN = math.nan


def test_figures_are_those_written_out_token_by_token():
    rollout, training = [[-1.0, -2.0], [], [-0.5]], [[-1.1, -2.0], [], [-0.4995]]
    d = [-0.1, 0.0, 0.0005]
    found = Mismatch.of(rollout, training)
    assert found.num_tokens == 3
    assert found.mean_abs == pytest.approx(sum(map(abs, d)) / 3)
    assert found.max_abs == pytest.approx(0.1)
    assert found.kl == pytest.approx(sum(math.exp(x) - 1 - x for x in d) / 3)
    assert found.share_above_1e_3 == pytest.approx(1 / 3)


def test_kl_estimates_rollout_against_training_and_not_the_other_way_round():
    """Over all tokens in proportion to the rollout's distribution the estimate is the divergence itself."""
    q, p = (0.5, 0.25, 0.25), (0.125, 0.5, 0.375)  # rollout, training
    counts = [4, 2, 2]
    rollout, training = ([math.log(x) for x, n in zip(each, counts, strict=True) for _ in range(n)] for each in (q, p))
    exact = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    other_way = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    assert Mismatch.of([rollout], [training]).kl == pytest.approx(exact)
    assert abs(exact - other_way) > 0.01


def test_kl_of_rounding_keeps_its_digits():
    assert Mismatch.of([[-1.0]], [[-1.0 + 2**-24]]).kl == pytest.approx(2**-49, rel=1e-6)


@pytest.mark.parametrize("samples", [[], [[]], [[], []]])
def test_without_tokens_everything_is_zero(samples):
    assert Mismatch.of(samples, samples) == Mismatch.merge([]) == Mismatch.merge([Mismatch(), Mismatch()]) == Mismatch()


def test_a_merge_is_that_of_all_tokens_together():
    rollout = [[-1.0, -2.0, -3.0], [-0.5], [], [-4.0, -0.1]]
    training = [[-1.1, -2.0, -3.0], [-0.52], [], [-4.0, -0.1001]]
    whole = Mismatch.of(rollout, training)
    parts = [Mismatch.of([a], [b]) for a, b in zip(rollout, training, strict=True)]
    for merged in (
        Mismatch.merge(parts),
        Mismatch.merge(reversed(parts)),
        Mismatch.merge([Mismatch.merge(parts[:2]), *parts[2:]]),
    ):
        assert merged.as_dict() == pytest.approx(whole.as_dict())


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("broken", ["rollout", "training"])
def test_a_nan_anywhere_surfaces(at, broken):
    good = [[-1.0], [-2.0], [-3.0]]
    bad = [[NAN] if i == at else row for i, row in enumerate(good)]
    pair = (bad, good) if broken == "rollout" else (good, bad)
    merged = Mismatch.merge(Mismatch.of([a], [b]) for a, b in zip(*pair, strict=True))
    for found in (Mismatch.of(*pair), merged):
        assert all(math.isnan(x) for x in (found.mean_abs, found.max_abs, found.kl))
        assert found.share_above_1e_3 == pytest.approx(1 / 3)
        assert found.num_tokens == 3


def test_a_token_that_training_finds_impossible_is_infinitely_far():
    found = Mismatch.of([[-1.0, -1.0]], [[-1.0, -math.inf]])
    assert found.mean_abs == found.max_abs == found.kl == math.inf
    assert found.share_above_1e_3 == 0.5


@pytest.mark.parametrize("training", [[[-1.0]], [[-1.0], [-1.0]], [[-1.0], [-1.0, -2.0, -3.0]]])
def test_logprobs_of_other_samples_or_tokens_are_refused(training):
    with pytest.raises(ValueError, match="rollout samples have"):
        Mismatch.of([[-1.0], [-1.0, -2.0]], training)


def test_keys_begin_with_the_prefix():
    keys = {"num_tokens", "mean_abs", "max_abs", "kl", "share_above_1e_3"}
    assert Mismatch().as_dict().keys() == {f"mismatch_{key}" for key in keys}
    assert Mismatch().as_dict("rollout/").keys() == {f"rollout/{key}" for key in keys}
