"""The glossary names things that exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GLOSSARY = Path(__file__).parents[2] / "docs" / "reference" / "glossary.md"
NUM_COLUMNS = 6
TERMS = (
    "prefill context parallelism", "decode context parallelism", "zigzag (head-tail)", "load-balanced",
    "KV replica group", "KV shard", "piece", "part", "slot", "block table", "ColumnParallelLinear",
    "RowParallelLinear", "colocated rollouts", "hybrid engine", "chunked prefill", "all-to-all", "reduce-scatter",
    "attention sinks", "CUDA-graph batch size", "cascade attention", "shared prefix", "ring attention",
    "attention state", "lse", "prefix caching", "preemption by recompute", "fork", "parallel sampling",
    "importance ratio", "TIS", "weights version", "KV expansion",
)  # fmt: skip


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the table, its head and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def places(cell: str) -> Iterator[str]:
    yield from re.findall(r"`([\w.]+)`", cell)


def resolve(name: str) -> Any:
    """What a dotted name stands for: a module, or what is in one; a field of a dataclass counts by its annotation."""
    parts = name.split(".")
    thing: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        if isinstance(thing, ModuleType) and not hasattr(thing, part):
            thing = importlib.import_module(".".join(parts[: i + 1]))
        elif hasattr(thing, part):
            thing = getattr(thing, part)
        else:
            thing = thing.__annotations__[part]
    return thing


TABLE = rows(GLOSSARY.read_text(encoding="utf-8"))


def test_every_row_has_all_cells_and_a_place_in_the_code():
    assert len(TABLE) > 20
    for row in TABLE:
        assert len(row) == NUM_COLUMNS and all(row), row
        assert list(places(row[-1])), row


@pytest.mark.parametrize("name", sorted({name for row in TABLE for name in places(row[-1])}))
def test_a_place_in_the_code_exists(name):
    resolve(name)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_field_is_found_by_who_greps_for_it(term):
    assert term in GLOSSARY.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["cpinfer.layout.nothing", "cpinfer.layout.grid.Nothing", "cpinfer.layout.grid.RankGrid.nothing", "nothing.at_all"],
)
def test_a_place_that_does_not_exist_is_noticed(name):
    with pytest.raises((ModuleNotFoundError, KeyError, AttributeError)):
        resolve(name)


def test_a_row_that_lacks_a_cell_is_noticed():
    assert [len(row) for row in rows("| a | b |\n|---|---|\n| x | y |\n| z |")] == [2, 1]
