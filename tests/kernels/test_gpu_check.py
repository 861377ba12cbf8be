"""The stages of the GPU check, tiny, over interpreted kernels: their code runs as far as it can without a GPU.

What it measures is no figure. Captured graphs are the same work launched again; `test_replays.py` has what a real one
keeps of FlashInfer's kernels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cpinfer_tools.gpu import gpu_check
from interpreted_cuda.tensors import to_cuda, triton_on_host

pytestmark = [
    pytest.mark.timeout(1800),  # compiles what it asks for
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter was not chosen"),
]


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def to(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """As `Module.to`, which has no memory of CUDA to give parameters."""
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        to_cuda(module)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with triton_on_host():
        yield


# Triton's interpreter cuts float32 off where a GPU rounds it to bfloat16. (Nor can anything be said of times.)
CUT_OFF = ("states packed as bfloat16", "states merged from bfloat16")


def capture(run: Callable[[], None]) -> Callable[[], None]:
    run()
    return run


@pytest.mark.parametrize("stage", ["parity", "model", "graphs"])
def test_a_stage_runs_and_reaches_its_targets(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpinfer.engine.decode_cuda_graphs.capture_on_cuda", lambda: capture)
    code = gpu_check.main(["--smoke", "--only", stage, "--no-card"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["is_smoke"] and list(told["stages"]) == ["build", stage]
    found = told["stages"][stage]
    assert found["error"] is None and len(found["figures"]) >= 3
    assert all(math.isfinite(figure["value"]) for figure in found["figures"])
    missed = [f["name"] for f in found["figures"] if f["ok"] is False and f["unit"] != "ms per decode step"]
    assert all(name.startswith(CUT_OFF) for name in missed) and (code == 0 or stage != "model")
