"""Files that people and tools outside read: they agree with the code and with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import cpinfer

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def loaded(name: str):
    return yaml.safe_load(read(name))


def test_the_version_is_said_in_one_place_and_repeated_truly():
    project = tomllib.loads(read("pyproject.toml"))
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert loaded("CITATION.cff")["version"] == cpinfer.__version__
    assert cpinfer.__version__ in read("CHANGELOG.md")


def test_the_changelog_is_one():
    titles = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    kinds = re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_format_asks_for():
    found = loaded("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= found.keys() and found["cff-version"] == "1.2.0"


def test_a_commit_is_checked_by_what_make_check_runs():
    rule = read("Makefile").partition("\ncheck:")[2].partition("\n\n")[0]
    checks = [line.split("$(BIN)/")[1] for line in rule.splitlines() if "$(BIN)/" in line]
    hooks = [
        hook["entry"].removeprefix(".venv/bin/") for hook in loaded(".pre-commit-config.yaml")["repos"][0]["hooks"]
    ]
    assert [check.removesuffix(" .") for check in checks] == hooks


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_an_issue_form_is_valid_as_far_as_forms_go(name):
    form = loaded(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["type"] in {"textarea", "input", "dropdown", "markdown"} for part in form["body"])


def test_what_the_page_on_stability_names_exists():
    page = read("docs/reference/stability.md")
    for module in re.findall(r"`(cpinfer\.[a-z_.]+)`", page):
        path = ROOT.joinpath(*module.split("."))
        assert module == "cpinfer.__all__" or path.is_dir() or path.with_suffix(".py").is_file(), module
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / "reference" / link).exists()
