"""FlashInfer's own kernels, interpreted. `make kernels` brings what these tests want; elsewhere there are none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if os.environ.get("FLASHINFER_NVCC") else ["test_*.py"]


@pytest.fixture(scope="session")
def pretended() -> None:
    """A process with a GPU and FlashInfer, as far as either can tell."""
    from interpreted_cuda.device import CARDS, pretend

    pretend(CARDS["a100"])


@pytest.fixture(autouse=True)
def on_the_device(pretended: None) -> Iterator[None]:
    """Every test, and the threads that it starts, may say `device="cuda"`."""
    from interpreted_cuda.modules import LAUNCHES
    from interpreted_cuda.tensors import on_cuda_in_threads

    LAUNCHES.clear()
    with on_cuda_in_threads():
        yield


@pytest.fixture(autouse=True)
def nothing_deprecated() -> Iterator[None]:
    """What a version warns of will be an error in a later one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module=r"cpinfer\.")
        yield
