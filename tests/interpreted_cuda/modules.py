"""Modules that FlashInfer loads, with functions that take CUDA tensors: views of DLPack whose device is CUDA.

A call may touch the storages of the tensors that it is given and nothing else; what fails in a kernel is an error of
the call, with the thread and the instruction.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from interpreted_cuda import interpreter
from interpreted_cuda.interpreter import KernelFaultError
from interpreted_cuda.tensors import CudaTensor, host_of

# Codes and bits of DLPack.
_DTYPES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float8_e4m3fn: (10, 8),
    torch.float8_e5m2: (12, 8),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint32: (1, 32),
    torch.bool: (6, 8),
}
_CPU, _CUDA = 1, 2


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class View:
    """A tensor as tvm_ffi asks for it. Has to live for as long as what was made of it."""

    def __init__(self, tensor: Tensor) -> None:
        self._kind = _CUDA if isinstance(tensor, CudaTensor) else _CPU
        self._host = host = host_of(tensor)
        dims = host.dim()
        self._shape = (ctypes.c_int64 * max(dims, 1))(*host.shape)
        self._strides = (ctypes.c_int64 * max(dims, 1))(*host.stride())
        code, bits = _DTYPES[host.dtype]
        places = ctypes.addressof(self._shape), ctypes.addressof(self._strides)
        described = _DLTensor(host.data_ptr() or 0, self._kind, 0, dims, code, bits, 1, *places, 0)
        self._managed = _Managed(described, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._kind, 0

    def __dlpack__(self, **_: Any) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self._managed), b"dltensor", None)


# One GPU, and an interpreter that is not for several threads.
LOCK = threading.RLock()
# The kernels that were launched, since somebody emptied it.
LAUNCHES: list[str] = []
# The modules that were loaded, by their paths.
LOADED: list[str] = []


@contextmanager
def touching(tensors: Sequence[CudaTensor]) -> Any:
    """In it kernels may touch the storages of these tensors."""
    storages = [tensor.host.untyped_storage() for tensor in tensors]
    for storage in storages:
        interpreter.library().interpreter_allow(storage.data_ptr(), storage.nbytes())
    try:
        yield
    finally:
        for storage in storages:
            interpreter.library().interpreter_forbid(storage.data_ptr())


class Module:
    """A module of tvm_ffi whose functions take tensors of torch, on CUDA or not."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return _called_with_views(found) if callable(found) else found


def _called_with_views(function: Callable[..., Any]) -> Callable[..., Any]:
    import tvm_ffi

    def call(*args: Any) -> Any:
        views = [View(x) if isinstance(x, Tensor) else None for x in args]
        given = [x if view is None else tvm_ffi.from_dlpack(view) for x, view in zip(args, views, strict=True)]
        with LOCK, touching([x for x in args if isinstance(x, CudaTensor)]):
            result, caught = None, None
            try:
                result = function(*given)
            except Exception as error:
                caught = error
            failed = interpreter.error()
            LAUNCHES.extend(interpreter.launches())
        given.clear()  # first: what was made of a view reads it once more when it goes
        if failed:
            raise KernelFaultError(failed) from caught
        if caught is not None:
            raise caught
        return result

    return call


class Recording:
    """Kernels as a CUDA graph has them: with the parameters that they were launched with, over memory of later."""

    def __init__(self) -> None:
        self.num_kernels = 0

    def __enter__(self) -> Recording:
        interpreter.library().interpreter_record(1)
        return self

    def __exit__(self, *_: object) -> None:
        interpreter.library().interpreter_record(0)

    def replay(self, tensors: Sequence[CudaTensor]) -> int:
        """Launch them again; they may touch these tensors. How many there were."""
        with LOCK, touching(tensors):
            launched = int(interpreter.library().interpreter_replay())
        failed = interpreter.error()
        interpreter.launches()
        if launched < 0:
            raise KernelFaultError(failed)
        return launched
