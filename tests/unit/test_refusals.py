"""The table of what is refused: every row has words and a use, and nothing is refused outside of it."""

import ast
from functools import cache
from pathlib import Path

import pytest

from cpinfer.errors import UnsupportedError, UserError
from cpinfer.other_engines_keys import REFUSED_KEYS, REFUSED_VALUES
from cpinfer.refusals import REFUSALS, not_yet_table, refuse

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("cpinfer", "integrations", "tools") for p in (ROOT / folder).rglob("*.py"))


def refused_keys(source):
    """Keys of the table that a source names in calls of `refuse`; None for one that is worked out at run time."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "refuse":
            key = node.args[0]
            yield key.value if isinstance(key, ast.Constant) else None


@cache
def keys_by_file():
    return {path: list(refused_keys(path.read_text(encoding="utf-8"))) for path in SOURCES}


@pytest.mark.parametrize("key", REFUSALS)
def test_every_row_says_what_and_what_to_do_instead(key):
    row = REFUSALS[key]
    assert row.what.strip() == row.what and len(row.what) > 5
    assert row.instead[0].isupper() and row.instead.endswith(".")


@pytest.mark.parametrize("key", REFUSALS)
def test_every_row_is_used_somewhere(key):
    used = {k for keys in keys_by_file().values() for k in keys} | set(REFUSED_KEYS.values())
    assert key in used | set(REFUSED_VALUES.values())


def test_every_key_that_is_used_is_in_the_table():
    unknown = [(path.name, k) for path, keys in keys_by_file().items() for k in keys if k and k not in REFUSALS]
    assert not unknown
    assert {*REFUSED_KEYS.values(), *REFUSED_VALUES.values()} <= set(REFUSALS)


def test_only_keys_of_other_engines_look_their_rows_up_at_run_time():
    """Elsewhere the scan above would miss them."""
    assert [path.name for path, keys in keys_by_file().items() if None in keys] == ["other_engines_keys.py"]


def test_the_scan_sees_calls_of_any_form():
    source = 'raise refuse("a", "x")\nerrors.append(str(refusals.refuse("b", f"{y}")))\nrefuse(k, "z")\nother("c")'
    assert set(refused_keys(source)) == {"a", "b", None}


def test_no_unsupported_error_is_raised_past_the_table():
    raised = [
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UnsupportedError"
    ]
    assert raised == ["refusals.py"]


def test_a_refusal_says_what_is_what_is_missing_and_what_to_do():
    error = refuse("replicate_q", "dcp=4 pcp=1")
    assert isinstance(error, UnsupportedError) and isinstance(error, UserError)
    assert str(error).startswith("dcp=4 pcp=1: cpinfer does not support ")
    row = REFUSALS["replicate_q"]
    assert row.what in str(error) and str(error).endswith(row.instead)


def test_a_row_that_does_not_exist_cannot_be_refused():
    with pytest.raises(KeyError):
        refuse("warp_drive", "x")


def test_the_not_yet_list_is_the_table_row_by_row():
    lines = not_yet_table().splitlines()
    assert lines[:2] == ["| refused | instead |", "|---|---|"]
    assert len(lines) == 2 + len(REFUSALS)
    for line, row in zip(lines[2:], REFUSALS.values(), strict=True):
        assert line == f"| {row.what} | {row.instead} |" and line.count("|") == 3
