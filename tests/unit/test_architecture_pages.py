"""The pages of docs/architecture name what is there, in the order that is enforced."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_glossary import resolve

from documents import code_blocks, page

ROOT = Path(__file__).parents[2]
FLOORS, REQUEST, TENSOR = (page(f"architecture/{name}.md") for name in ("floors", "request", "kv-tensor"))
# Names that the page of requests writes from the package.
PACKAGES = ("attention", "colocate", "comm", "engine", "kv_cache", "layout", "models", "ops")
TOOLS = ("cpinfer_integrations", "cpinfer_tools")


def floors_drawn(text: str) -> list[list[str]]:
    """The names on every floor of the drawing, top to bottom."""
    return [re.split(r"\s{2,}", line)[0].split(" | ") for line in code_blocks(text, "text")[0].splitlines()]


def places(text: str) -> dict[str, str]:
    """Folders of the table "What is where", and what is said of each."""
    return dict(re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", text, re.MULTILINE))


def modules_missing(text: str) -> Iterator[str]:
    """What the table names that is not there: a folder, or a module or package inside it."""
    for folder, said in places(text).items():
        if not (ROOT / folder).is_dir():
            yield folder
        for name in re.findall(r"`(\w+)`", said):
            if not any((ROOT / folder).rglob(f"{name}.py")) and not any((ROOT / folder).rglob(f"{name}/")):
                yield f"{folder}{name}"


def packages_left_out(text: str) -> set[str]:
    """Top-level packages and modules of cpinfer that the table does not name."""
    found = {
        path.stem for path in (ROOT / "cpinfer").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    rows = places(text)
    named = {Path(folder).name for folder in rows} | set(re.findall(r"`(\w+)`", rows["cpinfer/"]))
    return found - {"__init__"} - named


def names_in_code(text: str) -> list[str]:
    """Dotted names of the package, written from it or in full."""
    short = re.findall(rf"(?<![\w./])((?:{'|'.join(PACKAGES)})\.\w[\w.]*\w)", text)
    full = re.findall(rf"(?<![\w./])((?:cpinfer|{'|'.join(TOOLS)})\.\w[\w.]*\w)", text)
    return [*(f"cpinfer.{name}" for name in short), *full]


def unresolved(text: str) -> Iterator[str]:
    for name in names_in_code(text):
        try:
            resolve(name)
        except (AttributeError, KeyError, ModuleNotFoundError):
            yield name


def test_the_floors_that_are_drawn_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [layers] = [c["layers"] for c in contracts if c["name"] == "Imports go down only"]
    assert floors_drawn(FLOORS) == [layer.split(" | ") for layer in layers]


def test_two_floors_that_are_swapped_are_noticed() -> None:
    swapped = FLOORS.replace("cpinfer.engine  ", "cpinfer.NEXT  ").replace("cpinfer.models  ", "cpinfer.engine  ")
    swapped = swapped.replace("cpinfer.NEXT  ", "cpinfer.models  ")
    assert floors_drawn(swapped) != floors_drawn(FLOORS)
    assert sorted(map(str, floors_drawn(swapped))) == sorted(map(str, floors_drawn(FLOORS)))


def test_what_the_table_of_floors_names_exists_and_no_package_is_left_out() -> None:
    assert len(places(FLOORS)) > 10
    assert not list(modules_missing(FLOORS)) and not packages_left_out(FLOORS)


def test_a_folder_a_module_and_a_package_that_are_wrong_are_noticed() -> None:
    assert "cpinfer/commune/" in modules_missing(FLOORS.replace("`cpinfer/comm/`", "`cpinfer/commune/`"))
    assert list(modules_missing(FLOORS.replace("`rank_watch`", "`rank_match`"))) == ["cpinfer/comm/rank_match"]
    assert packages_left_out(re.sub(r"^\| `cpinfer/comm/`.*\n", "", FLOORS, flags=re.MULTILINE)) == {"comm"}
    assert packages_left_out(FLOORS.replace("`strict_json`", "strict JSON")) == {"strict_json"}


@pytest.mark.parametrize(("text", "at_least"), [(REQUEST, 70), (TENSOR, 15)], ids=["request", "kv-tensor"])
def test_every_name_of_the_code_on_a_page_is_there(text: str, at_least: int) -> None:
    assert len(names_in_code(text)) >= at_least
    assert not list(unresolved(text))


def test_a_name_that_is_gone_is_noticed() -> None:
    wrong = "`engine.core.EngineCore.advanced` cpinfer_tools.rollouts.main `layout.prefill.zigzag_split`"
    assert sorted(unresolved(wrong)) == ["cpinfer.engine.core.EngineCore.advanced", "cpinfer_tools.rollouts.main"]


def test_every_class_of_the_chain_is_on_the_page_of_requests() -> None:
    chain = ("Engine", "InputProcessor", "EngineCore", "Scheduler", "StepPlanner", "StepAttention", "ModelRunner")
    assert all(re.search(rf"\.{name}\b", REQUEST) for name in (*chain, "PrefillStep", "DecodeStep", "LogitsReader"))


def test_what_is_drawn_of_the_tensor_is_what_its_examples_say() -> None:
    drawing = code_blocks(TENSOR, "text")[0]
    examples = "\n".join(code_blocks(TENSOR, "pycon"))
    for drawn, printed in {
        "0 1 6 7 2 3 4 5": "[0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 4.0, 5.0]",
        "rows 0 1 4 5 6 7 2 3 spell": "[0, 1, 4, 5, 6, 7, 2, 3]",
        "0 1 4 5 -> slots 6 7 2 3": "[6, 7, 2, 3], [6, 7, 2, 3]",
        "8 -> slot 10": "[[10], []]",
    }.items():
        assert drawn in drawing and printed in examples
