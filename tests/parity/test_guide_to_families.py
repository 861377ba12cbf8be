"""The guide to adding a family adds one, and what it says of fields is what happens without them."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import pytest
from test_family_parity import (
    CHUNKS,
    PCP2_DCP2,
    TOLERANCE,
    TP2_DCP2,
    TP2_PCP2_DCP4,
    WITH_WHOLE_NORMS,
    Whole,
    differences,
    whole,
)
from transformers import AutoConfig

from cpinfer.engine.attach import model_spec
from cpinfer.errors import UnsupportedError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.families import FAMILIES, Family, family_table
from documents import code_blocks, page
from tiny_models import TINY, make_model

GUIDE = page("extending/family.md")


def blocks() -> tuple[str, str]:
    row, settings = code_blocks(GUIDE)
    return row, settings


def added() -> tuple[str, Family, dict[str, Any]]:
    """Name, row and settings of the family that the guide adds."""
    row, settings = blocks()
    [(name, family)] = eval(f"{{{row}}}", {"Family": Family}).items()
    return name, family, ast.literal_eval(f"{{{settings}}}")[name]


def test_the_family_that_the_guide_adds_runs_in_every_kind_of_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    name, family, settings = added()
    config = AutoConfig.for_model(name, **{**TINY, **settings})
    with pytest.raises(UnsupportedError, match=f'"{name}"'):
        model_spec(make_model(config))
    monkeypatch.setitem(FAMILIES, name, family)
    assert f"| {family.title} (`{name}`) | {family.attention} | works |" in family_table()
    of = Whole(config)
    for grid in (RankGrid(), PCP2_DCP2, TP2_PCP2_DCP4):
        assert max(differences(of, grid, **CHUNKS)) <= TOLERANCE


def fields_of_the_guide() -> dict[str, str]:
    rows = re.findall(r"^\| (.*) \| `(\w+)` \|$", GUIDE, flags=re.MULTILINE)
    return {field: seen for seen, field in rows}


def test_the_guide_has_every_field_of_a_row() -> None:
    fields = {field.name for field in dataclasses.fields(Family)} - {"title", "attention"}
    assert set(fields_of_the_guide()) == fields


# Of each field: a family that has it, and a layout in which it is missed.
MISSED: dict[str, tuple[str, RankGrid]] = {
    "layers_drop_keywords": ("nemotron", PCP2_DCP2),
    "window_in_mask_alone": ("phimoe", PCP2_DCP2),
    "window_on_every_layer": ("starcoder2", PCP2_DCP2),
    "returns_router_scores": ("gpt_oss", PCP2_DCP2),
    "is_latent": ("deepseek_v2", PCP2_DCP2),
    "flag_of_norm_of_all_heads": ("cohere", TP2_DCP2),
    "refused": ("phi3", TP2_DCP2),
    "has_query_gates": ("qwen3_5_text", PCP2_DCP2),
    "size_names": ("kimi_linear", PCP2_DCP2),
}


@pytest.mark.parametrize("field", MISSED)
def test_what_the_guide_says_is_seen_without_a_field_is_seen(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, grid = MISSED[field]
    of = Whole(WITH_WHOLE_NORMS[family]) if field == "flag_of_norm_of_all_heads" else whole(family)
    default = Family("", "")
    without = dataclasses.replace(FAMILIES[family], **{field: getattr(default, field)})
    assert without != FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, without)
    with pytest.raises(Exception) as caught:
        differences(of, grid, **CHUNKS)
    told = re.findall(r"`([^`]+)`", fields_of_the_guide()[field])
    assert any(words in str(caught.value) for words in told), (str(caught.value), told)
