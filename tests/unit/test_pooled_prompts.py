"""Pooling: each distinct prompt once, every asked sample exactly once, back in the order asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpinfer.engine.pooled_prompts import PooledPrompts
from cpinfer.errors import RanksDifferError

PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=2)
ASKED = st.lists(st.lists(PROMPT, max_size=5), min_size=1, max_size=4)


@given(ASKED)
def test_every_asked_sample_is_a_sample_of_its_own_prompt_and_nobody_elses(asked):
    pooled = PooledPrompts.of(asked)
    assert len(set(pooled.prompts)) == len(pooled.prompts)
    assert [len(own) for own in pooled.places] == [len(own) for own in asked]
    for prompts, places in zip(asked, pooled.places, strict=True):
        assert [list(pooled.prompts[index]) for index, _ in places] == prompts
    handed_out = [place for own in pooled.places for place in own]
    wanted = [(i, sample) for i, count in enumerate(pooled.counts) for sample in range(count)]
    assert sorted(handed_out) == wanted


def test_nobody_asking_for_anything_gives_nothing():
    assert PooledPrompts.of([[], []]) == PooledPrompts((), (), ((), ()))


def test_copies_of_one_owner_count_once_and_must_ask_for_the_same():
    assert PooledPrompts.of_ranks([[[1]], [[1]], [[2]], [[2]]], 2) == PooledPrompts.of([[[1]], [[2]]])
    with pytest.raises(RanksDifferError, match=r"places 2 to 3 .*num_copies=2"):
        PooledPrompts.of_ranks([[[1]], [[1]], [[2]], [[3]]], 2)
