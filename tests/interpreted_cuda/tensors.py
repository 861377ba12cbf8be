"""CUDA tensors for a torch that has none: memory of the host that says it lies on `cuda:0`.

    with on_cuda():                            torch.empty(2, device="cuda") is a CudaTensor in here
        torch.zeros(2, device="cuda") + 1      a CudaTensor
        torch.zeros(2, device="cuda") + torch.ones(2)        RuntimeError, as on a GPU

Fresh memory is filled with 0xff, NaN in every type of floating point: what reads before it writes is seen. A mode is
of one thread, so threads want one each (`on_cuda_in_threads`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
FRESH = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::empty_like"}


class CudaTensor(Tensor):
    """A tensor on `cuda:0` whose memory is that of its `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> CudaTensor:
        made: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=CUDA
        )
        made.host = host
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What has to be answered above the dispatcher: what asks for memory, or takes a device guard first."""
        answer = ABOVE_THE_DISPATCHER.get(func)
        if answer is not None:
            return answer(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, dict(kwargs or {}))


def host_of(x: Any) -> Any:
    """The memory of a CUDA tensor as a tensor of the host; anything else as it is."""
    return x.host if isinstance(x, CudaTensor) else x


def to_cuda(module: nn.Module) -> None:
    """Parameters and buffers of a model as CUDA tensors, over the memory that they have."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(CudaTensor(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = CudaTensor(buffer)


class _CudaMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, dict(kwargs or {}))


def on_cuda() -> AbstractContextManager[Any]:
    """In it, `device="cuda"` works, in this thread."""
    return _CudaMode()


@contextmanager
def on_cuda_in_threads() -> Iterator[None]:
    """As `on_cuda`, also in threads that begin within."""
    run = threading.Thread.run

    def run_on_cuda(thread: threading.Thread) -> None:
        with on_cuda():
            run(thread)

    with mock.patch.object(threading.Thread, "run", run_on_cuda), on_cuda():
        yield


@contextmanager
def triton_on_host() -> Iterator[None]:
    """Triton's interpreter, which has to have been chosen before it was imported, over the memory of CUDA tensors."""
    from triton.runtime import interpreter

    call, lock = interpreter.GridExecutor.__call__, threading.RLock()

    def on_host(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return call(executor, *map(host_of, args), **{name: host_of(x) for name, x in kwargs.items()})

    with mock.patch.object(interpreter.GridExecutor, "__call__", on_host):
        yield


def made_on_cuda(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and the like, which make their tensors below any mode."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None:
            return make(*args, **kwargs)
        out = make(*map(host_of, args), device="cpu" if _is_cuda(device) else device, **kwargs)
        return CudaTensor(out) if _is_cuda(device) else out

    return made


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


# --- the dispatcher

# Memory that says it is pinned, by its address; kept, so that no other memory comes to lie there.
_PINNED: dict[int, Tensor] = {}


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    pin = kwargs.pop("pin_memory", None)
    special = _SPECIAL.get(name)
    if special is not None:
        return special(func, *args, **kwargs)
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    on_device = [x for x in given if isinstance(x, CudaTensor)]
    device = kwargs.get("device")
    if not on_device and not _is_cuda(device):
        out = func(*args, **kwargs)
        if pin and isinstance(out, Tensor):
            _PINNED[out.untyped_storage().data_ptr()] = out
        return out
    if on_device and any(x.dim() for x in given if not isinstance(x, CudaTensor)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )
    if device is not None:
        kwargs["device"] = "cpu"
    out = func(*tree_map(host_of, args), **tree_map(host_of, kwargs))
    if name in FRESH:
        _fill(out)
    if device is not None and not _is_cuda(device):
        return out
    same = {id(x.host): x for x in on_device}  # what ops work in place on stays what it was
    return tree_map(lambda x: same.get(id(x), CudaTensor(x)) if isinstance(x, Tensor) else x, out)


def _fill(fresh: Tensor) -> None:
    storage = fresh.untyped_storage()
    ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())


def _to_copy(func: Any, x: Tensor, *, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    out: Tensor = func(host_of(x), device="cpu", **kwargs)
    return CudaTensor(out) if _is_cuda(device or x.device) else out


def _copy(func: Any, to: Tensor, of: Tensor, non_blocking: bool = False) -> Tensor:
    host_of(to).copy_(host_of(of))
    return to


def _histogram(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """On CUDA of whole numbers too."""
    if not isinstance(x, CudaTensor):
        return func(x, *args, **kwargs)  # type: ignore[no-any-return]
    return CudaTensor(func(x.host.double(), *args, **kwargs).to(x.dtype))


_SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::is_pinned": lambda func, x, *_: host_of(x).untyped_storage().data_ptr() in _PINNED,
    "aten::_to_copy": _to_copy,
    "aten::copy_": _copy,
    "aten::histc": _histogram,
    "aten::record_stream": lambda func, x, stream: None,
}


# --- above it


def _numpy(x: Tensor, **_: Any) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")


def _set_item(x: Tensor, index: Any, value: Any) -> None:
    is_elsewhere = isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value, CudaTensor)
    if not isinstance(x, CudaTensor) or is_elsewhere:
        raise RuntimeError("an item of a tensor was set from another device")
    x.host[tree_map(host_of, index)] = host_of(value)


def _set_data(x: Tensor, value: Tensor) -> None:
    """As `Module.float()` does: another memory, and perhaps another dtype, under the same parameter."""
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(x, value)  # type: ignore[attr-defined]
    if isinstance(x, CudaTensor):
        x.host = host_of(value)


def _get_item(x: Tensor, index: Any) -> Tensor:
    if isinstance(x, CudaTensor):
        return CudaTensor(x.host[tree_map(host_of, index)])
    raise RuntimeError("an item of a tensor was asked for by an index on another device")


ABOVE_THE_DISPATCHER: dict[Any, Callable[..., Any]] = {
    Tensor.data_ptr: lambda x: x.host.data_ptr(),
    Tensor.untyped_storage: lambda x: x.host.untyped_storage(),
    Tensor.is_pinned: lambda x, *_: False,
    Tensor.__repr__: lambda x, **_: f"on cuda: {x.host!r}",
    Tensor.tolist: lambda x: x.host.tolist(),
    Tensor.numpy: _numpy,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.copy_: lambda to, of, non_blocking=False: _copy(None, to, of),
    Tensor.__setitem__: _set_item,
    Tensor.__getitem__: _get_item,
}
