"""Every example in a docstring of cpinfer, and every one in a page of the documentation, is true."""

import doctest
import importlib
import pkgutil

import pytest

import cpinfer
from documents import blocks, name_of, pages

MODULES = sorted({"cpinfer", *(m.name for m in pkgutil.walk_packages(cpinfer.__path__, "cpinfer."))})

# Sessions of Python in pages, in order: a block goes on where the one before it ended.
SESSIONS = {page: blocks(page.read_text(encoding="utf-8"), "pycon") for page in pages()}
CONCEPTS = ("exchanges", "kv-cache", "parallelism", "states", "zigzag")


def run_session(text: str, name: str) -> doctest.TestResults:
    """The sessions of a page, run as one."""
    code = "\n".join(block.code for block in blocks(text, "pycon"))
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(code, {}, name, None, 0))
    return runner.summarize()


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("cpinfer", "torch", "transformers", "numpy"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is optional")
    result = doctest.testmod(module)
    assert result.failed == 0


def test_modules_and_their_examples_are_found():
    assert {"cpinfer.layout.grid", "cpinfer.errors"} <= set(MODULES)
    grid = importlib.import_module("cpinfer.layout.grid")
    assert doctest.testmod(grid).attempted >= 3


@pytest.mark.parametrize("page", [page for page, found in SESSIONS.items() if found], ids=name_of)
def test_examples_in_pages_are_true(page):
    result = run_session(page.read_text(encoding="utf-8"), name_of(page))
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_numbers_of_a_concept_are_repeated_by_examples(name):
    [page] = [page for page in SESSIONS if page.parent.name == "concepts" and page.stem == name]
    assert len(SESSIONS[page]) >= 5


@pytest.mark.parametrize("expected, num_failed", [("[0, 2, 4, 6, 8]", 0), ("[0, 2, 4, 6, 7]", 1)])
def test_an_example_in_a_page_that_is_not_true_fails(expected, num_failed, capsys):
    page = (
        "# A page\n\n```pycon\n>>> from cpinfer.layout.prefill import zigzag_cuts\n```\n\nProse.\n\n"
        f"```pycon\n>>> zigzag_cuts(8, pcp_size=2).tolist()\n{expected}\n```\n"
    )
    result = run_session(page, "page.md")
    assert (result.failed, result.attempted) == (num_failed, 2)


def test_an_example_without_a_fence_of_sessions_is_none():
    """So nobody writes one that is never run: pages have `>>>` in such fences alone."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        in_sessions = sum(block.code.count(">>> ") for block in SESSIONS[page])
        assert text.count(">>> ") == in_sessions, name_of(page)
