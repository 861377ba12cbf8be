"""CUDA tensors in host memory behave as on a GPU where mistakes would show."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tvm_ffi

from interpreted_cuda.modules import Module, View
from interpreted_cuda.tensors import CUDA, CudaTensor, host_of, to_cuda


def test_devices_do_not_mix() -> None:
    a = torch.ones(3, device="cuda")
    assert isinstance(a, CudaTensor) and a.is_cuda and a.device == CUDA
    for mixed in (
        lambda: a + torch.ones(3),
        lambda: torch.cat([a, torch.ones(1)]),
        lambda: a[torch.tensor([0, 1])] + a,
    ):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(RuntimeError):
        a[:] = torch.zeros(3)
    with pytest.raises(TypeError):
        a.numpy()
    assert (a + torch.tensor(2.0)).tolist() == [3, 3, 3]  # as scalars may
    assert a.cpu().numpy().tolist() == [1, 1, 1] and not isinstance(a.cpu(), CudaTensor)


def test_fresh_memory_is_nan_and_views_share_it() -> None:
    for fresh in (
        torch.empty(4, device=CUDA),
        torch.ones(4, device=CUDA).new_empty(4),
        torch.empty_like(torch.ones(4, device=CUDA)),
    ):
        assert torch.isnan(fresh).all()
    a = torch.zeros(2, 3, device=CUDA)
    a[0].fill_(1.0)
    a.t()[2].add_(5)
    assert a.tolist() == [[1, 1, 6], [0, 0, 5]]
    assert a.t().data_ptr() == a.data_ptr() and isinstance(a.t(), CudaTensor)
    index = torch.tensor([1], device=CUDA)
    assert isinstance(index, CudaTensor) and a[index].tolist() == [[0, 0, 5]]


def test_copies_cross_over() -> None:
    a = torch.empty(3, device=CUDA)
    assert a.copy_(torch.arange(3.0)) is a
    b = torch.empty(3, dtype=torch.int32, pin_memory=True)
    assert b.is_pinned() and not a.is_pinned() and not torch.empty(3).is_pinned()
    b.copy_(a)
    assert b.tolist() == [0, 1, 2]
    assert b.to(CUDA, non_blocking=True).device == CUDA and a.to("cpu").device.type == "cpu"
    assert a.to(torch.bfloat16).device == CUDA


def test_a_copy_of_a_model_in_another_dtype_computes_in_it() -> None:
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    to_cuda(model)
    exact = copy.deepcopy(model).float()
    x = torch.rand(1, 3, device=CUDA)
    out = exact(x)
    assert out.dtype == torch.float32 and host_of(exact.weight).dtype == torch.float32
    want = x.host @ host_of(model.weight).float().t() + host_of(model.bias).float()
    torch.testing.assert_close(host_of(out), want)
    assert model.weight.dtype == host_of(model.weight).dtype == torch.bfloat16


def test_views_outlive_what_a_call_made_of_them(monkeypatch: Any) -> None:
    """Which reads its view for a deleter when it goes: of memory that was given back it may be anything."""
    was_there: list[bool] = []

    class Made:
        def __init__(self, view: View) -> None:
            self.view = weakref.ref(view)

        def __del__(self) -> None:
            was_there.append(self.view() is not None)

    monkeypatch.setattr(tvm_ffi, "from_dlpack", Made)
    Module(SimpleNamespace(run=lambda *given: None)).run(torch.ones(2), torch.ones(2, device=CUDA))
    assert was_there == [True, True]
