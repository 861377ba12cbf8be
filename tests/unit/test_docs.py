"""What the README says of the code is what the code says."""

from __future__ import annotations

import pytest

import docs


def test_the_readme_is_up_to_date_with_the_code() -> None:
    assert docs.main(["--check"]) == 0, "run `make docs`"


def test_a_stale_part_is_noticed_and_rewritten() -> None:
    stale = "a <!-- begin families -->\nwhatever\n<!-- end families --> b"
    assert docs.refreshed(stale) == f"a <!-- begin families -->\n{docs.family_list()}\n<!-- end families --> b"


def test_a_part_that_no_code_makes_is_an_error() -> None:
    with pytest.raises(KeyError):
        docs.refreshed("<!-- begin nothing -->\n<!-- end nothing -->")
