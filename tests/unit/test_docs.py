"""What the documentation says of the code is what the code says."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import cpinfer
import docs
import rank_picture
from command_reference import parser_of, section
from cpinfer.models.families import FAMILIES, family_table
from cpinfer.refusals import not_yet_table
from docs_parts import INTEGRATIONS, PARTS, public_names, python_names, taken_over

ROOT = Path(__file__).parents[2]


def test_the_documentation_is_up_to_date_with_the_code() -> None:
    assert docs.main(["--check"]) == 0, "run `make docs`"


def test_a_stale_part_is_noticed_and_rewritten() -> None:
    stale = "a <!-- begin families -->\nwhatever\n<!-- end families --> b"
    assert docs.refreshed(stale) == f"a <!-- begin families -->\n{family_table()}\n<!-- end families --> b"


def test_every_part_is_rewritten_where_it_stands_and_what_lies_between_is_left_alone() -> None:
    names = tuple(reversed(PARTS))
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


def test_parts_are_looked_for_in_the_readme_and_in_every_page(tmp_path: Path) -> None:
    (tmp_path / "docs" / "a" / "b").mkdir(parents=True)
    for name in ("README.md", "docs/x.md", "docs/a/b/y.md", "docs/a/z.png"):
        (tmp_path / name).touch()
    assert [str(page.relative_to(tmp_path)) for page in docs.pages(tmp_path)] == [
        "README.md",
        "docs/a/b/y.md",
        "docs/x.md",
    ]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_part_stands_on_one_page(part: str) -> None:
    mark = f"<!-- begin {part} -->"
    assert sum(mark in page.read_text(encoding="utf-8") for page in docs.pages(ROOT)) == 1


def test_the_reference_of_a_command_has_its_flags_and_its_words() -> None:
    text = section("explain")
    flags = [
        flag for action in parser_of("explain")._actions for flag in action.option_strings if flag.startswith("--")
    ]
    assert {"--tp", "--plan", "--seq-len"} <= set(flags)
    for flag in set(flags) - {"--help", "--local-rank", "--local_rank"}:
        assert f"`{flag}" in text
    assert "| `--tp TP` | ranks that share the weights (default 1) |" in text and "--local_rank" not in section(
        "rollout"
    )


def test_a_command_that_parses_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("command_reference.cli.run", lambda *args, **kwargs: 0)
    with pytest.raises(ValueError, match="parses nothing"):
        parser_of("explain")


def test_public_names_are_read_off_a_module_and_none_without_all(tmp_path: Path) -> None:
    assert "make_rollout_func" in public_names(INTEGRATIONS / "trl.py")
    (tmp_path / "empty.py").write_text("x = 1\n", encoding="utf-8")
    assert public_names(tmp_path / "empty.py") == []


def test_every_public_name_has_one_directive_where_users_import_it_from() -> None:
    names = [line.removeprefix("::: ") for line in python_names().splitlines() if line.startswith("::: ")]
    assert len(names) == len(set(names)) and {f"cpinfer.{name}" for name in cpinfer.__all__} <= set(names)
    assert "cpinfer_integrations.deepspeed.CpinferRolloutEngine" in names
    assert not any(name.startswith("cpinfer_integrations.deepspeed_rollout.") for name in names)
    assert ("cpinfer_integrations.deepspeed_rollout", "CpinferRolloutEngine") in taken_over(
        INTEGRATIONS / "deepspeed.py"
    )
    assert taken_over(INTEGRATIONS / "deepspeed_rollout.py") == []


def test_the_picture_says_of_each_rank_what_the_layout_says() -> None:
    tree = ElementTree.fromstring(rank_picture.rank_picture())
    words = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [f"rank {rank}" for rank in range(rank_picture.GRID.world_size)] == [
        w for w in words if w and w.startswith("rank ")
    ]
    assert words.count("KV head 0, shard 0") == words.count("KV head 1, shard 1") == 2
    assert [w for w in words if w and w.startswith("piece ")] == [
        "piece 0: pcp0", "piece 1: pcp1", "piece 2: pcp1", "piece 3: pcp0",
    ]  # fmt: skip


def test_the_readme_counts_families_as_their_table_does() -> None:
    assert f"[{len(FAMILIES)} families](docs/reference/models.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
