"""`cpinfer build-kernels`: what would be compiled for a model and a GPU, and what is refused before anything is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cpinfer.attention.backends.flashinfer.building import Built
from cpinfer.attention.backends.flashinfer.kernels import KernelModule
from cpinfer.errors import UserError
from cpinfer_tools import build_kernels
from tiny_models import FAMILIES

Folder = Callable[..., Path]
REAL_LATENTS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A model's folder, of its config.json alone, with heads that kernels exist for."""

    def make(family: str, **changes: Any) -> Path:
        values = {n: v for n, v in copy.deepcopy(FAMILIES[family]).to_dict().items() if n != "qk_head_dim"}
        changes = REAL_LATENTS if family == "deepseek_v3" else {"head_dim": 128, **changes}
        type(FAMILIES[family])(**{**values, **changes}).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert build_kernels.main([*arguments, "--list"]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("family", "arch", "modules"),
    [
        ("llama", "8.0", ["batch_prefill fa2 bfloat16 of 128"]),
        ("llama", "9.0a", ["batch_prefill fa2 bfloat16 of 128", "batch_prefill fa3 bfloat16 of 128"]),
        (
            "gemma2",
            "10.0a",
            [
                "batch_prefill fa2 bfloat16 of 128 with a soft cap",
                "batch_prefill fa2 bfloat16 of 128 with windows and a soft cap",
            ],
        ),
        ("deepseek_v3", "9.0", ["batch_mla fa3 bfloat16 of 576/512", "batch_prefill fa2 bfloat16 of 192/128"]),
    ],
    ids=str,
)
def test_what_a_model_asks_for_on_a_gpu_is_listed(
    capsys: pytest.CaptureFixture[str], folder: Folder, family: str, arch: str, modules: list[str]
) -> None:
    assert sorted(listed(capsys, "--model", str(folder(family)), "--arch", arch)) == modules


def test_a_configs_layout_dtype_and_cache_count(capsys: pytest.CaptureFixture[str], folder: Folder) -> None:
    """With as many ranks as query heads each has one over a copy of its KV head, which no tensor cores take."""
    config = folder("llama").parent / "config.json"
    config.write_text(json.dumps({"model": "model", "dtype": "float16", "kv_cache_dtype": "fp8_e5m2"}))
    told = listed(capsys, "--config", str(config), "--arch", "8.0", "--set", "tensor_parallel.tp_size=8")
    assert sorted(told) == [
        "batch_decode fa2 float16 of 128",
        "batch_decode fa2 float16 over float8_e5m2 of 128",
        "batch_prefill fa2 float16 of 128",
        "batch_prefill fa2 float16 over float8_e5m2 of 128",
    ]


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("deepseek_v3", ["--arch", "10.0a", "kv_cache_dtype=fp8"], "latents cached in float8_e4m3fn under bfloat16 on"),
        ("llama", ["--arch", "7.5"], "--arch 7.5, compute capability 7.5: cpinfer does not support FlashInfer"),
        ("llama", ["--arch", "hopper"], "--arch hopper: a compute capability was wanted"),
        ("llama", [], "there is no GPU here, so --arch has to say"),
        ("llama", ["--arch", "8.0", "dtype=float32"], "with float32"),
        ("llama", ["--arch", "8.0", 'model="nowhere"'], "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_before_anything_is(
    capsys: pytest.CaptureFixture[str], folder: Folder, family: str, arguments: list[str], words: str
) -> None:
    config = folder(family).parent / "config.json"
    config.write_text(json.dumps({"model": "model"}))
    given = [part for x in arguments for part in (["--set", x] if "=" in x else [x])]
    assert build_kernels.main(["--config", str(config), *given]) == 2
    assert words in capsys.readouterr().err


def test_without_flashinfer_or_a_toolkit_that_is_said(
    capsys: pytest.CaptureFixture[str], folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_kernels, "find_spec", lambda name: None)
    arguments = ["--model", str(folder("llama")), "--arch", "8.0"]
    assert build_kernels.main(arguments) == 2 and 'pip install "cpinfer[flashinfer]"' in capsys.readouterr().err
    monkeypatch.setattr(build_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(build_kernels, "cuda_home", lambda: None)
    monkeypatch.setattr(build_kernels, "missing_tools", lambda home: ("nvcc in CUDA_HOME/bin",))
    assert build_kernels.main(arguments) == 2 and "FlashInfer lacks nvcc in CUDA_HOME/bin" in capsys.readouterr().err
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert build_kernels.main(arguments) == 2 and "Unset it" in capsys.readouterr().err


@pytest.mark.parametrize("compiles", [True, False])
def test_what_is_compiled_is_told_and_the_last_line_is_an_object(
    capsys: pytest.CaptureFixture[str],
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiles: bool,
) -> None:
    library = tmp_path / "module.so"
    library.write_bytes(bytes(2**20))

    def built(modules: Sequence[KernelModule], say: Any) -> Iterator[Built]:
        for module in modules:
            if not compiles:
                raise UserError("it does not compile")
            yield Built(module, library, 61.4)

    monkeypatch.setattr(build_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(build_kernels, "cuda_home", lambda: None)
    monkeypatch.setattr(build_kernels, "missing_tools", lambda home: ())
    monkeypatch.setattr(build_kernels, "build_modules", built)
    monkeypatch.setattr(build_kernels.metadata, "version", lambda name: "0.7.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    assert build_kernels.main(["--model", str(folder("llama"))]) == (0 if compiles else 1)
    out, err = capsys.readouterr()
    if not compiles:
        assert "it does not compile" in err and not out
        return
    assert "1 of 1: batch_prefill fa2 bfloat16 of 128: compiled in 61 s, 1.0 MiB" in err
    told = json.loads(out.splitlines()[-1])
    assert (told["arch"], told["flashinfer"]) == ("8.0", "0.7.2")
    assert told["modules"] == [{"module": "batch_prefill fa2 bfloat16 of 128", "seconds": 61.4, "bytes": 2**20}]
