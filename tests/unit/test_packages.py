"""What is an extra is named where it is missing, and the table of extras is that of pyproject.toml."""

import doctest
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cpinfer import packages
from cpinfer.errors import UserError
from cpinfer.packages import EXTRAS, need_package

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_extra_brings_the_package_that_it_is_named_for():
    for package, extra in EXTRAS.items():
        brought = [re.split(r"[><=;\[ ]", spec)[0] for spec in PROJECT["optional-dependencies"][extra]]
        assert package in brought
    required = {re.split(r"[><=;\[ ]", spec)[0] for spec in PROJECT["dependencies"]}
    assert not required & EXTRAS.keys()


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    need_package("wandb", "nobody")  # it is here
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'the key "wandb" needs the package wandb.*pip install "cpinfer\[wandb\]"'):
        need_package("wandb", 'the key "wandb"')
    assert packages.missing_package("torch", "nobody") is None
    assert "cpinfer[rl]" in str(packages.missing_package("matplotlib", "train-grpo", "rl"))


@pytest.mark.parametrize("module", ["accelerate", "deepspeed", "lm_eval", "trl", "wandb"])
def test_an_integration_without_its_library_names_it_with_how_to_get_it(module: str):
    """In a process of its own, in which the library cannot be found."""
    code = f"import sys; sys.modules[{module!r}] = None; import cpinfer_integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ") and f"needs the package {module}" in last and "pip install" in last


@pytest.mark.parametrize("package", ["pydantic", "starlette", "uvicorn", "prometheus_client"])
def test_the_server_without_one_of_its_packages_names_it_with_how_to_get_it(package: str):
    code = f"import sys; sys.modules[{package!r}] = None; import cpinfer_integrations.server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    last = done.stderr.splitlines()[-1]
    assert f"needs the package {package}" in last and 'pip install "cpinfer[serve]"' in last


def test_the_example_is_true():
    found = doctest.testmod(packages)
    assert found.attempted and not found.failed
