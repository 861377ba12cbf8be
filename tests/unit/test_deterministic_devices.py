"""Devices that the deterministic mode runs on, and what it asks of one that no test has seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cpinfer.attention.backends.ordered_check as ordered_check
import cpinfer.engine.deterministic as deterministic
from cpinfer.attention.backends.base import AttentionNeeds, LayerKind
from cpinfer.attention.backends.ordered_check import ordered_fault
from cpinfer.engine.logits_reader import LogitsReader
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.grid import RankGrid
from cpinfer.models.invariant_rows import invariant_rows
from cpinfer.models.row_invariance import GPU_PIECES, PIECES, _Rows
from cpinfer.ops.ordered_attention import OrderedAttention
from cpinfer.ops.states import State

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
NEEDS = AttentionNeeds(
    torch.bfloat16,
    ((4, KVLayout(2, 16, 16)), (3, KVLayout(1, 24, 16, v_is_prefix_of_k=True))),
    layers=(LayerKind(), LayerKind(has_window=True)),
    cache_dtype=torch.float8_e4m3fn,
)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")


def test_a_gpu_is_prepared_and_told_by_name_since_ranks_must_have_the_same(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deterministic, "triton_module", lambda name: SimpleNamespace())
    monkeypatch.setattr(deterministic, "version", lambda package: "3.0")
    assert deterministic.prepare_deterministic(GPU) == {"attention kernel": "Triton 3.0", "GPU": "A GPU"}


def test_devices_without_kernels_are_refused_by_name(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"device meta: .* other devices than CPU and CUDA"):
        deterministic.prepare_deterministic(torch.device("meta"))
    monkeypatch.setattr(deterministic, "triton_module", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5: .* before Ampere"):
        deterministic.prepare_deterministic(GPU)
    monkeypatch.setattr(deterministic, "triton_module", lambda name: None)
    with pytest.raises(UnsupportedError, match="without Triton"):
        deterministic.prepare_deterministic(GPU)


def test_an_attention_kernel_that_keeps_its_bits_has_no_fault() -> None:
    assert ordered_fault(NEEDS, 8, 4, CPU) is None


def broken(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[State, Tensor], State]) -> str:
    """What is said of a kernel of which a method, or a function, returns something else."""
    home: Any = OrderedAttention if hasattr(OrderedAttention, name) else ordered_check
    found = getattr(home, name)

    def changed(*args: Any, **kwargs: Any) -> State:
        return change(found(*args, **kwargs), args[1])

    monkeypatch.setattr(home, name, changed)
    fault = ordered_fault(NEEDS, 8, 4, CPU)
    assert fault is not None
    return fault


def test_faults_of_an_attention_kernel_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert "has other bits for queries [0, 1) than beside others" in broken(
            patch, "run", lambda state, q: (state[0], state[1] + 1e-6 * (len(q) == 1))
        )
    with monkeypatch.context() as patch:
        assert "has other bits for queries [5, 200) than" in broken(
            patch, "run", lambda state, q: (state[0] * (1 + 1e-6 * (len(q) == 195)), state[1])
        )
    with monkeypatch.context() as patch:
        assert "has other bits over two KV shards than over one" in broken(
            patch, "states", lambda state, q: (state[0].flip(2), state[1].flip(2))
        )
    with monkeypatch.context() as patch:
        assert "a logarithm to base 2" in broken(
            patch, "run", lambda state, q: (state[0], state[1] * 1.4426950408889634)
        )


def test_on_a_gpu_a_fault_of_one_rank_is_an_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that is none, whose tensors are the CPU's."""
    asked = []
    monkeypatch.setattr(deterministic, "check_row_invariance", lambda *args, **kwargs: None)
    monkeypatch.setattr(deterministic, "ordered_fault", lambda *args: asked.append(args))
    replica = SimpleNamespace(all_gather=lambda x: torch.tensor([[False], [True]]))
    topology: Any = SimpleNamespace(replica=replica, grid=RankGrid())
    runner: Any = SimpleNamespace(device=torch.device("meta"))
    config, needs = (
        SimpleNamespace(**x) for x in ({"deterministic_kv_shards": 8, "interleave": 4}, {"attention": NEEDS})
    )
    with pytest.raises(UserError, match="deterministic attention cannot be kept on meta: another rank says why"):
        deterministic.check_deterministic(runner, topology, config, needs)  # type: ignore[arg-type]
    assert asked == [(NEEDS, 8, 4, torch.device("meta"))]


def test_on_a_gpu_more_rows_are_compared_and_logprobs_are_sums_of_the_mode() -> None:
    """What is launched there changes with the number of rows."""
    pieces = [
        _Rows.of(SimpleNamespace(device=torch.device(d), vocab_size=9), nullcontext).pieces for d in ("cpu", "meta")
    ]
    assert pieces == [PIECES, GPU_PIECES] and sum(GPU_PIECES) > 1024
    arounds = [
        LogitsReader(None, device, None, as_trained=as_trained)._around  # type: ignore[arg-type]
        for device, as_trained in ((GPU, True), (GPU, False), (CPU, True))
    ]
    assert arounds == [invariant_rows, nullcontext, nullcontext]
