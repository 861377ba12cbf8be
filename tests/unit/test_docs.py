"""What the README says of the code is what the code says."""

from __future__ import annotations

import pytest

import docs
from cpinfer.models.families import family_table
from cpinfer.refusals import not_yet_table


def test_the_readme_is_up_to_date_with_the_code() -> None:
    assert docs.main(["--check"]) == 0, "run `make docs`"


def test_a_stale_part_is_noticed_and_rewritten() -> None:
    stale = "a <!-- begin families -->\nwhatever\n<!-- end families --> b"
    assert docs.refreshed(stale) == f"a <!-- begin families -->\n{family_table()}\n<!-- end families --> b"


def test_every_part_is_rewritten_where_it_stands_and_what_lies_between_is_left_alone() -> None:
    names = ("not-yet", "families", "layouts", "keys", "input-lines")
    stale = "x".join(f"<!-- begin {name} -->\nstale text\n<!-- end {name} -->" for name in names)
    fresh = docs.refreshed(f"top {stale} bottom")
    assert "stale text" not in fresh and fresh.startswith("top ") and fresh.endswith(" bottom")
    assert [fresh.index(f"<!-- begin {name} -->") for name in names] == sorted(
        fresh.index(f"<!-- begin {name} -->") for name in names
    )
    assert not_yet_table() in fresh and family_table() in fresh
    assert docs.refreshed(fresh) == fresh


def test_a_part_that_no_code_makes_is_an_error() -> None:
    with pytest.raises(KeyError):
        docs.refreshed("<!-- begin nothing -->\n<!-- end nothing -->")
