"""Fingerprints: everything that is compared moves the digest, and the first difference is told by name."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpinfer.config import SamplingParams
from cpinfer.engine.fingerprint import difference, digest_of, leaves, table_of


@dataclass(frozen=True)
class Item:
    number: int
    tokens: tuple[int, ...]


SAME = {"call": "generate", "sampling": SamplingParams(seed=1), "prompts": (Item(0, (1, 2)), Item(1, (3,)))}

CHANGES = [
    ({"call": "score"}, "rank 1 has call 'score', rank 0 has 'generate'"),
    ({"sampling": SamplingParams(seed=2)}, "rank 1 has sampling.seed 2, rank 0 has 1"),
    ({"sampling": SamplingParams(seed=1, stop=("a",))}, "rank 1 has sampling.stop ['a'], rank 0 has []"),
    ({"prompts": (Item(0, (1, 2)),)}, "rank 1 has prompts.count 1, rank 0 has 2"),
    ({"prompts": (Item(0, (1, 3)), Item(1, (3,)))}, "rank 1 has prompts[0].tokens [1, 3], rank 0 has [1, 2]"),
    ({"prompts": (Item(1, (3,)), Item(0, (1, 2)))}, "rank 1 has prompts[0].number 1, rank 0 has 0"),
    ({"more": 1}, "rank 1 has more 1, rank 0 has nothing more"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_change_moves_the_digest_and_is_told_by_name(change, told):
    other = {**SAME, **change}
    assert digest_of(other) != digest_of(SAME)
    assert difference([table_of(SAME), table_of(other)], [0, 1], [0, 0]) == told


def test_equal_values_have_no_difference():
    again = {"call": "generate", "sampling": SamplingParams(seed=1), "prompts": (Item(0, (1, 2)), Item(1, (3,)))}
    assert digest_of(again) == digest_of(SAME)
    assert difference([table_of(SAME), table_of(again)], [0, 1], [0, 0]) is None


def test_a_rank_that_has_less_is_told_too():
    told = difference([table_of({**SAME, "more": 1}), table_of(SAME)], [0, 1], [0, 0])
    assert told == "rank 1 has nothing more, rank 0 has more 1"


def test_ranks_with_one_other_value_stand_together_and_each_is_held_against_its_own_reference():
    tables = [table_of({"w": value}) for value in ("a", "b", "a", "c", "a", "c")]
    assert difference(tables, range(10, 16), [0, 1, 0, 1, 0, 1]) == "ranks 13, 15 have w 'c', rank 11 has 'b'"
    tables[5] = table_of({"w": "d"})
    assert (
        difference(tables, range(10, 16), [0, 1, 0, 1, 0, 1]) == "rank 13 has w 'c', rank 15 has w 'd', rank 11 has 'b'"
    )


def test_values_too_long_to_show_are_told_apart_by_digest():
    long = tuple(range(1000))
    told = difference([table_of({"t": long}), table_of({"t": (*long[:-1], 7)})], [0, 1], [0, 0])
    assert told is not None
    mine, theirs = told.split(", rank 0 has ")
    assert "(1000 in all) (digest " in mine and "(1000 in all) (digest " in theirs
    assert mine.split("digest ")[1] != theirs.split("digest ")[1]


def test_names_and_values_cannot_pass_for_each_other():
    assert digest_of({"a": "b", "c": "d"}) != digest_of({"a": "b', 'c", "": "d"})
    assert digest_of({"t": ((1, 2), (3,))}) != digest_of({"t": ((1,), (2, 3))})
    assert digest_of({"t": 1}) != digest_of({"t": True}) != digest_of({"t": 1.0})


def test_token_ids_may_be_larger_than_a_machine_word():
    assert digest_of({"t": (2**70, 1)}) != digest_of({"t": (2**70, 2)})


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4), st.data())
def test_any_changed_token_is_seen(prompts, data):
    row = data.draw(st.integers(0, len(prompts) - 1))
    changed = [list(tokens) for tokens in prompts]
    changed[row].append(3)
    assert digest_of({"p": prompts}) != digest_of({"p": changed})
    assert next(leaves({"p": prompts})) == ("p.count", len(prompts))
