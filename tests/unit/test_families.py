"""The table of families: what is in it exists, and what is printed of it says the same."""

import re

import pytest
from transformers import AutoConfig

from cpinfer.config import JobConfig, TensorParallel
from cpinfer.engine.attach import config_errors
from cpinfer.models.families import FAMILIES, FEATURES, OTHER_NAMES, RECURRENT, family_table
from cpinfer.models.spec import ModelSpec
from tiny_models import FAMILIES as TINY_MODELS


def lines_of_the_table():
    table, _, notes = family_table().partition("\n\n")
    return table.splitlines(), notes.splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_model_type_of_transformers(family):
    assert AutoConfig.for_model(family).model_type == family


def test_every_family_has_a_tiny_model_to_be_tested_with():
    assert set(TINY_MODELS) == set(FAMILIES)
    for family, config in TINY_MODELS.items():
        assert ModelSpec.from_config(config.to_dict()).family == family


def test_the_table_has_one_row_for_each_family_in_order():
    table, _ = lines_of_the_table()
    assert len(table) == 2 + len(FAMILIES)
    for line, (name, family) in zip(table[2:], FAMILIES.items(), strict=True):
        assert cells(line)[:2] == [f"{family.title} (`{name}`)", family.attention]


def test_the_columns_are_the_features_in_order():
    table, _ = lines_of_the_table()
    assert cells(table[0]) == ["family", "attention", *FEATURES.values()]
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert set(table[1]) == {"|", "-"}
    assert list(FEATURES) == ["pcp_dcp", "autotp", "copied_heads", "mixed_heads", "transformers_tp"]


def test_every_cell_says_works_or_names_the_note_with_its_reason():
    table, notes = lines_of_the_table()
    reasons = dict(re.fullmatch(r"\[(\d+)\] (.*)\.", note.strip()).groups() for note in notes)
    used = []
    for line, family in zip(table[2:], FAMILIES.values(), strict=True):
        for feature, cell in zip(FEATURES, cells(line)[2:], strict=True):
            if feature in family.refused:
                word, reason = "refused", family.refused[feature]
            elif feature in family.not_applicable:
                word, reason = "-", family.not_applicable[feature]
            else:
                assert cell == "works"
                continue
            number = re.fullmatch(rf"{word} \[(\d+)\]", cell)[1]
            assert reasons[number] == reason
            used.append(number)
    assert set(used) == set(reasons)


def test_notes_are_numbered_from_one_as_they_are_met_and_none_is_said_twice():
    table, notes = lines_of_the_table()
    assert [note.split("]")[0] for note in notes] == [f"[{i}" for i in range(1, len(notes) + 1)]
    assert len({note.split("] ")[1] for note in notes}) == len(notes)
    met = list(dict.fromkeys(re.findall(r"\[(\d+)\]", "\n".join(table))))
    assert met == [str(i) for i in range(1, len(notes) + 1)]


def test_only_features_of_the_table_are_refused_or_not_applicable_and_none_is_both():
    for family in FAMILIES.values():
        assert set(family.refused) | set(family.not_applicable) <= set(FEATURES)
        assert not set(family.refused) & set(family.not_applicable)
        assert all(reason for reason in (*family.refused.values(), *family.not_applicable.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_refuses_tensor_parallelism_where_the_table_does(family):
    spec = ModelSpec.from_config(TINY_MODELS[family].to_dict())
    for provider, feature in (("transformers", "transformers_tp"), ("autotp", "autotp")):
        errors = config_errors(spec, JobConfig(tensor_parallel=TensorParallel(2, provider)))
        why = FAMILIES[family].refused.get("autotp") or FAMILIES[family].refused.get(feature)
        assert bool(why) == bool(errors)
        assert all(f'model_type "{family}" with tp=2 ({why})' in error for error in errors)


def test_what_no_tensor_parallelism_can_cut_is_refused_in_every_column_of_it():
    refused = [family for family in FAMILIES.values() if "autotp" in family.refused]
    assert refused
    for family in refused:
        assert {*family.refused, *family.not_applicable} == set(FEATURES) - {"pcp_dcp"}
        assert len(set(family.refused.values())) == 1


def test_other_names_are_those_of_families_here_and_of_none():
    assert set(OTHER_NAMES.values()) <= set(FAMILIES)
    assert not set(OTHER_NAMES) & (set(FAMILIES) | set(RECURRENT))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_mixed_in_no_family_where_the_table_says_there_is_one(family):
    spec = ModelSpec.from_config(TINY_MODELS[family].to_dict())
    has_one = "mixed_heads" in FAMILIES[family].not_applicable
    assert (spec.num_kv_heads == 1) == has_one
