"""What only a GPU can show: FlashInfer's kernels, Triton's, the same bits, and captured graphs.

Skipped, and said so, without one.
"""

from __future__ import annotations

import pytest
import torch

from cpinfer.attention.backends.base import AttentionNeeds, LayerKind
from cpinfer.attention.backends.registry import make_backend
from cpinfer.layout.capacity import KVLayout
from cpinfer_tools.gpu import gpu_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),  # kernels compile when they are first used
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flashinfer_passes_its_own_check(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    layers = (LayerKind(), LayerKind(has_window=True))
    needs = AttentionNeeds(dtype, ((8, KVLayout(2, 128, 128)),), cache_dtype, layers)
    assert make_backend("auto", torch.device("cuda"), needs).name == "flashinfer"


@pytest.mark.parametrize("stage", ["parity", "model", "deterministic", "graphs"])
def test_a_stage_of_the_gpu_check_reaches_its_targets(stage: str) -> None:
    assert gpu_check.main(["--only", stage, "--no-card"]) == 0
