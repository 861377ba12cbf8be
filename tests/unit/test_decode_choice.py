"""Which of two ways to decode is predicted to be faster, against steps that are counted one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpinfer.layout.decode_choice import DecodeRates, best_shards, phase_seconds

RATES = DecodeRates(5.0, 0.5, 0.01)
SAMPLES = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40)), min_size=1, max_size=12)


def step_by_step(rates, contexts, new, num_homes, num_shards):
    """Every step on its own, its rows and keys counted."""
    seconds = 0.0
    for step in range(1, max(new)):
        homes = []
        for home in range(num_homes):
            alive = [
                c + step
                for i, (c, n) in enumerate(zip(contexts, new, strict=True))
                if n > step and i % num_homes == home
            ]
            if alive:
                rows = -(-len(alive) // num_shards)
                homes.append(rates.first_s + rates.row_s * (rows - 1) + rates.key_s * sum(alive) / num_shards)
        seconds += max(homes)
    return seconds


@given(SAMPLES, st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (1, 4)]))
def test_a_phase_is_the_sum_of_its_steps(samples, homes_and_shards):
    """But for which tokens within a stretch without an end make the slower home, of which the middle one decides."""
    contexts, new = zip(*samples, strict=True)
    num_homes, num_shards = homes_and_shards
    found = phase_seconds(RATES, contexts, new, num_homes=num_homes, num_shards=num_shards)
    wanted = step_by_step(RATES, contexts, new, num_homes, num_shards)
    assert found == pytest.approx(wanted, rel=0.03, abs=RATES.key_s * 10 * max(new))


def test_more_samples_than_run_at_once_take_more_steps_and_none_take_none():
    rates = DecodeRates(1.0, 0.0, 0.0)
    all_at_once, in_waves = (phase_seconds(rates, [9] * 64, [11] * 64, max_num_seqs=n) for n in (None, 16))
    assert (all_at_once, in_waves) == (10.0, 40.0)
    assert phase_seconds(rates, [], []) == phase_seconds(rates, [4], [1]) == 0.0


def test_what_collectives_cost_is_paid_where_one_home_has_all_keys_and_not_where_they_are_even():
    rates = {1: DecodeRates(1e-3, 0.0, 1e-7), 2: DecodeRates(2e-3, 0.0, 1e-7)}
    assert best_shards(rates, [100_000], [32]) == 2
    assert best_shards(rates, [100_000] * 2, [32] * 2) == 1
    assert best_shards(rates, [10_000], [32]) == 1
    assert best_shards(rates, [100_000, *[100] * 7], [32] * 8) == 2


def test_rates_come_from_three_times_and_never_say_that_more_takes_less():
    assert DecodeRates.through(1.0, (5, 3.0), (100, 2.0)) == DecodeRates(1.0, 0.5, 0.01)
    assert DecodeRates.through(1.0, (5, 0.9), (100, 0.9)) == DecodeRates(1.0, 0.0, 0.0)


def test_a_home_that_is_forgotten_would_be_seen():
    """Negative control: as if keys were dealt evenly whatever the layout."""
    uneven = phase_seconds(RATES, [4000, 1], [30, 30], num_homes=2)
    assert uneven > 1.5 * phase_seconds(RATES, [2000, 2001], [30, 30], num_homes=2)
    assert np.isfinite(uneven)
