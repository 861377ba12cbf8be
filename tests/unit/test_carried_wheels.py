"""The guide's section for a GPU machine without network: what is carried there is what kernels are known to need."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from cpinfer.attention.backends.flashinfer import toolchain
from documents import ROOT, page, shell_lines

GUIDE = page("guides/cpus-and-gpus.md")
SECTION = GUIDE.partition("### On a machine without network\n")[2].partition("\n### ")[0]


def interpreted() -> ModuleType:
    """What `make kernels` runs, which says with what FlashInfer is imported and compiled there."""
    spec = importlib.util.spec_from_file_location("run_kernels", ROOT / "tests" / "kernels" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collected(section: str) -> tuple[set[str], set[str]]:
    """What is collected with all that it needs, and what without."""
    lines = [shlex.split(line) for line in shell_lines(section) if line.startswith("pip wheel ")]
    packages = [{word for word in line[2:] if word not in ("-w", "wheels", "-c", "constraints.txt")} for line in lines]
    whole, alone = packages
    return whole, alone - {"--no-deps"}


def links(section: str) -> list[str]:
    """Where the section's links are made, below CUDA_HOME."""
    return [found[1] for line in shell_lines(section) if (found := re.fullmatch(r"ln -s .* \$CUDA_HOME/(\S+)", line))]


def test_what_is_carried_is_what_the_kernels_are_interpreted_with() -> None:
    whole, alone = collected(SECTION)
    comes_along = {"charset_normalizer"}  # requests needs it
    assert whole == {".", "cuda-toolkit[cccl,curand,nvcc]", *interpreted().IMPORTED} - comes_along
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert alone == set(extras["flashinfer"])
    assert collected(SECTION.replace(" einops", ""))[0] == whole - {"einops"}, "the control: one that is left out"


def test_the_packages_of_the_toolkit_are_the_same_wherever_they_are_named() -> None:
    (missing, *_) = toolchain.missing_tools(None)
    for package in interpreted().NVCC:
        assert package in GUIDE and package in missing


def test_with_the_links_of_the_section_a_toolkit_of_wheels_lacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": "unknown"}))
    for name in ("bin/nvcc", "include/cuda_runtime.h", "include/curand_kernel.h", "lib/libcudart.so.13"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    without = toolchain.missing_tools(tmp_path)
    assert [line.partition(" ")[0] for line in without] == ["libcudart.so", "libcuda.so"]
    for name in links(SECTION):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert toolchain.missing_tools(tmp_path) == () and toolchain.missing_for_fa3(tmp_path) is None
