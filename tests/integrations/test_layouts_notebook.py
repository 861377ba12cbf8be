"""The notebook of layouts runs, without torch, and what is committed of its outputs is what its code gives."""

from __future__ import annotations

import base64
import copy
import json
import os
import struct
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from launching import ENVIRON, ROOT

PATH = ROOT / "examples" / "layouts.ipynb"
MAX_BYTES = 300 * 1024
ASKS_FOR_TORCH = "import sys\nprint('torch' in sys.modules)"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def executed(committed: Any) -> Any:
    """The same cells, run anew, and one behind them."""
    notebook = copy.deepcopy(committed)
    notebook.cells.append(nbformat.v4.new_code_cell(ASKS_FOR_TORCH))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", record_timing=False)
    client.execute(env={**os.environ, **ENVIRON})
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: Any) -> list[str]:
    """What every cell printed."""
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream") for cell in code_cells(notebook)]


def picture_sizes(notebook: Any) -> list[list[tuple[int, int]]]:
    """Width and height of the pictures of every cell, from the heads of the PNGs."""
    pictures = [
        [base64.b64decode(o.data["image/png"]) for o in cell.outputs if "image/png" in o.get("data", {})]
        for cell in code_cells(notebook)
    ]
    return [[struct.unpack(">II", png[16:24]) for png in of_cell] for of_cell in pictures]


def test_what_cells_print_is_what_is_committed(committed: Any, executed: Any) -> None:
    """Otherwise: `jupyter execute --inplace examples/layouts.ipynb`."""
    assert texts(executed)[:-1] == texts(committed) and any(texts(committed))


def test_every_picture_that_is_committed_is_drawn_again(committed: Any, executed: Any) -> None:
    found, wanted = picture_sizes(executed)[:-1], picture_sizes(committed)
    assert [len(sizes) for sizes in found] == [len(sizes) for sizes in wanted] and sum(map(len, wanted)) >= 6
    for sizes, others in zip(found, wanted, strict=True):
        for size, other in zip(sizes, others, strict=True):
            assert size == pytest.approx(other, rel=0.05)  # fonts of another matplotlib are a little wider


def test_another_number_or_a_missing_picture_would_be_noticed(committed: Any) -> None:
    changed = copy.deepcopy(committed)
    stream = next(o for cell in code_cells(changed) for o in cell.outputs if o.output_type == "stream")
    stream.text = stream.text.replace("0", "1", 1)
    assert texts(changed) != texts(committed)
    with_picture = next(
        cell for cell in code_cells(changed) if any("image/png" in o.get("data", {}) for o in cell.outputs)
    )
    with_picture.outputs = []
    assert picture_sizes(changed) != picture_sizes(committed)


def test_layouts_are_drawn_without_torch(executed: Any) -> None:
    assert texts(executed)[-1] == "False\n"


def test_it_can_be_read_where_it_lies(committed: Any) -> None:
    nbformat.validate(committed)
    assert PATH.stat().st_size < MAX_BYTES
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    written = json.dumps(committed)
    assert "/work/" not in written and "/home/" not in written and "Traceback" not in written
