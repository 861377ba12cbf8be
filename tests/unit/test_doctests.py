"""Every example in a docstring of cpinfer is true."""

import doctest
import importlib
import pkgutil

import pytest

import cpinfer

MODULES = sorted({"cpinfer", *(m.name for m in pkgutil.walk_packages(cpinfer.__path__, "cpinfer."))})


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
