"""The table of public reports: every test that it names exists, and no report stands twice."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from public_reports import REPORTS, Report, reports_page

TESTS = Path(__file__).parents[1]
ROWS = [report for rows in REPORTS.values() for report in rows]


def functions_of(file: Path) -> set[str]:
    """Names of the functions at the top of a file; none where there is no file."""
    if not file.is_file():
        return set()
    return {node.name for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", sorted({report.test for report in ROWS}))
def test_every_test_that_is_named_exists(test: str) -> None:
    path, _, function = test.partition("::")
    assert Path(path).name.startswith("test_") and function.startswith("test_")
    assert function in functions_of(TESTS / path)


def test_a_test_that_does_not_exist_would_be_seen() -> None:
    assert "test_every_test_that_is_named_exists" in functions_of(Path(__file__))
    assert "test_nothing" not in functions_of(Path(__file__))
    assert not functions_of(TESTS / "unit" / "test_no_such_file.py")


def test_no_report_stands_twice_and_each_is_a_row() -> None:
    addresses = [report.address for report in ROWS]
    assert len(set(addresses)) == len(addresses)
    page = reports_page().splitlines()
    for report in ROWS:
        assert report.row in page
        assert report.row.count("|") == 5, "a cell that holds the mark between cells"
        assert report.symptom.endswith(".") and report.here.endswith(".")


def test_every_test_of_the_file_for_them_is_named() -> None:
    file = "parity/test_public_reports.py"
    own = {name for name in functions_of(TESTS / file) if name.startswith("test_")}
    assert own == {report.test.partition("::")[2] for report in ROWS if report.test.startswith(file)}


@pytest.mark.parametrize("address", ["vllm-project/vllm#2123", "https://github.com/vllm-project/vllm", ""])
def test_an_address_leads_to_a_report(address: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Report(address, "Seen.", "Not here.", "unit/test_table_of_reports.py::test_an_address_leads_to_a_report")
