"""What is an extra is named where it is missing, and the table of extras is that of pyproject.toml."""

import ast
import doctest
import re
import tomllib
from pathlib import Path

import pytest

from cpinfer import packages
from cpinfer.errors import UserError
from cpinfer.packages import EXTRAS, need_package
from cpinfer_tools.cli import COMMANDS
from launching import forked

ROOT = Path(__file__).parents[2]
ROOTS = (ROOT, ROOT / "integrations", ROOT / "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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


def said_without(package: str, module: str) -> str:
    """The last line of stderr when `module` is imported in a process of its own, in which `package` is not found."""
    finished = forked(1, "tests/unit/without_package.py", package, f"cpinfer_integrations.{module}", timeout_s=100)
    assert finished.returncode == 1, finished
    return finished.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", ["accelerate", "deepspeed", "lm_eval", "trl", "wandb"])
def test_an_integration_without_its_library_names_it_with_how_to_get_it(module: str):
    last = said_without(module, module)
    assert last.startswith("ModuleNotFoundError: ") and f"needs the package {module}" in last and "pip install" in last


@pytest.mark.parametrize("package", ["pydantic", "starlette", "uvicorn", "prometheus_client"])
def test_the_server_without_one_of_its_packages_names_it_with_how_to_get_it(package: str):
    last = said_without(package, "server")
    assert f"needs the package {package}" in last and 'pip install "cpinfer[serve]"' in last


def test_with_all_packages_every_integration_is_imported():
    """The control: it is the package that is missing."""
    for module in ("accelerate", "server"):
        finished = forked(
            1, "tests/unit/without_package.py", "nothing_at_all", f"cpinfer_integrations.{module}", timeout_s=100
        )
        assert finished.returncode == 0, finished


def test_the_example_is_true():
    found = doctest.testmod(packages)
    assert found.attempted and not found.failed


def imported_at_once(module: str) -> set[str]:
    """The packages that are imported with `module`, by itself or through modules of ours."""
    seen, to_read, packages = set(), [module], set()
    while to_read:
        name = to_read.pop()
        path = source_of(name)
        if path is None or name in seen:
            continue
        seen.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            packages |= {name.partition(".")[0] for name in names}
            to_read += names
    return packages


def source_of(module: str) -> Path | None:
    """The file of a module of ours."""
    places = [root.joinpath(*module.split(".")) for root in ROOTS]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_start_without_an_extra_says_which_in_the_reference(name):
    """Its section of the reference is printed from `extra`. `mismatch` needed psutil and did not say so."""
    command = COMMANDS[name]
    needed = imported_at_once(command.module) & set(EXTRAS)
    assert command.extra is not None or not needed
    assert name not in ("compare", "mismatch") or "psutil" in needed  # the imports are followed
