"""What FlashInfer's kernels are compiled with: what is missing is named, with what brings it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.flashinfer import backend as flashinfer_backend
from cpinfer.attention.backends.flashinfer import toolchain
from cpinfer.attention.backends.flashinfer.kernels import Chip
from cpinfer.errors import BackendFaultError
from cpinfer.layout.capacity import KVLayout

CUDA = torch.device("cuda")
LIBRARIES = ("lib64/libcudart.so", "lib64/stubs/libcuda.so")
FILES = ("bin/nvcc", "include/cuda_runtime.h", "include/curand_kernel.h", *LIBRARIES)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A toolkit as far as names go."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def finds(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """The compiler answers with the name of the library that it is asked for, in this folder."""

    def run(command: list[str], **_: Any) -> Any:
        return type("Done", (), {"stdout": f"{folder}{command[1].removeprefix('-print-file-name=')}\n"})

    monkeypatch.setattr(toolchain.subprocess, "run", run)


def test_a_whole_toolkit_lacks_nothing(home: Path) -> None:
    assert toolchain.missing_tools(home) == () and toolchain.missing_for_fa3(home) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bin/nvcc", "nvidia-cuda-nvcc"),
        ("include/cuda_runtime.h", "nvidia-cuda-runtime"),
        ("lib64/libcudart.so", "lib/libcudart.so.13"),
        ("lib64/stubs/libcuda.so", "cuda-driver-dev"),
    ],
)
def test_what_is_missing_is_named_alone(home: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finds(monkeypatch, "")
    (home / name).unlink()
    (missing,) = toolchain.missing_tools(home)
    assert words in missing and Path(name).name in missing and str((home / name).parent) in missing
    assert toolchain.missing_for_fa3(home) is None


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_the_compiler_finds_is_enough(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / name).unlink()
    finds(monkeypatch, "/lib/")
    assert toolchain.missing_tools(home) == ()


def test_without_a_toolkit_or_a_compiler_all_of_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    nvcc, compiler = toolchain.missing_tools(None)
    assert "CUDA_HOME/bin" in nvcc and "g++" in compiler
    assert "curand_kernel.h in CUDA_HOME/include" in str(toolchain.missing_for_fa3(None))


def test_compiled_kernels_want_no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_spec", lambda name: object())
    assert toolchain.missing_tools(None) == () and toolchain.missing_for_fa3(None) is None


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_where_flashinfer_finds_no_toolkit_there_is_none(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error("not there")

    monkeypatch.setattr(toolchain, "import_module", fail)
    assert toolchain.cuda_home() is None


def test_without_curands_headers_flashattention_2_is_taken_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "cuda_home", lambda: home)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flashinfer_backend.chip_of(CUDA) == Chip((9, 0), has_fa3_prefill=True)
    (home / "include/curand_kernel.h").unlink()
    with pytest.warns(UserWarning, match=r"prefill runs on FlashAttention-2.*curand_kernel\.h in .*nvidia-curand"):
        assert flashinfer_backend.chip_of(CUDA) == Chip((9, 0), has_fa3_prefill=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other GPUs have no use for them
        assert flashinfer_backend.chip_of(CUDA) == Chip((8, 0))


def test_a_failed_check_says_what_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BackendFaultError("it raised RuntimeError: ninja failed.")

    needs = AttentionNeeds(torch.bfloat16, ((8, KVLayout(2, 128, 128)),))
    monkeypatch.setattr(flashinfer_backend, "cuda_home", lambda: home)
    monkeypatch.setattr(flashinfer_backend, "FlashInferBackend", lambda device, needs: None)
    monkeypatch.setattr(flashinfer_backend, "chip_of", lambda device: Chip())
    monkeypatch.setattr(flashinfer_backend, "build_modules", lambda *_, **__: iter(()))
    monkeypatch.setattr(flashinfer_backend, "check_backend", fail)
    flashinfer_backend.check_flashinfer.cache_clear()
    with pytest.raises(BackendFaultError, match=r"ninja failed\.$"):
        flashinfer_backend.check_flashinfer(CUDA, needs)
    (home / "bin/nvcc").unlink()
    with (
        pytest.warns(UserWarning, match="lacks nvcc in"),
        pytest.raises(BackendFaultError, match=r"ninja failed\. To compile its kernels FlashInfer lacks nvcc in"),
    ):
        flashinfer_backend.check_flashinfer(CUDA, needs)
    flashinfer_backend.check_flashinfer.cache_clear()


def test_where_nothing_can_be_locked_flashinfer_compiles_by_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system without locks, where FlashInfer has a way of its own."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(37, "No locks available")

    checked: list[AttentionNeeds] = []
    monkeypatch.setattr(flashinfer_backend, "cuda_home", lambda: home)
    monkeypatch.setattr(flashinfer_backend, "FlashInferBackend", lambda device, needs: None)
    monkeypatch.setattr(flashinfer_backend, "chip_of", lambda device: Chip())
    monkeypatch.setattr(flashinfer_backend, "build_modules", fail)
    monkeypatch.setattr(flashinfer_backend, "check_backend", lambda backend, needs, device: checked.append(needs))
    flashinfer_backend.check_flashinfer.cache_clear()
    needs = AttentionNeeds(torch.bfloat16, ((8, KVLayout(2, 128, 128)),))
    with caplog.at_level("WARNING", logger="cpinfer"):
        flashinfer_backend.check_flashinfer(CUDA, needs)
    flashinfer_backend.check_flashinfer.cache_clear()
    assert checked == [needs] and "No locks available" in caplog.text
