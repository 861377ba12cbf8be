"""The interpreter as a library: what a kernel may touch, what failed, and short texts of PTX run over arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interpreted_cuda.build import interpreter_folder


class KernelFaultError(RuntimeError):
    """A kernel that cannot be read, or that failed: with its instruction and, where it ran, its thread."""


@cache
def library() -> ctypes.CDLL:
    """libcudart, loaded under this name: who wants it by the name finds this one."""
    found = ctypes.CDLL(str(interpreter_folder() / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
    found.interpreter_allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    found.interpreter_forbid.argtypes = [ctypes.c_uint64]
    found.interpreter_error.restype = ctypes.c_char_p
    found.interpreter_log.restype = ctypes.c_char_p
    return found


def error() -> str:
    """What failed first since this was asked last; empty for nothing."""
    said: bytes = library().interpreter_error()
    return said.decode()


def launches() -> list[str]:
    """A line for each kernel that was launched since this was asked last: its name, grid, and instructions."""
    said: bytes = library().interpreter_log()
    return said.decode().splitlines()


def run(
    ptx: str,
    *arguments: NDArray[Any] | np.generic,
    grid: Sequence[int] = (1, 1, 1),
    block: Sequence[int] = (32, 1, 1),
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    """Run the one kernel of a text. Arrays are given by address, and may be touched; scalars of numpy as they are.

    Raises:
        KernelFaultError: an instruction is not known, or the kernel failed.
    """
    given = [np.uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
    values = [np.frombuffer(x.tobytes(), dtype=np.uint8).copy() for x in given]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*(value.ctypes.data for value in values))
    arrays = [x for x in arguments if isinstance(x, np.ndarray)]
    for array in arrays:
        library().interpreter_allow(array.ctypes.data, array.nbytes)
    try:
        sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
        failed = library().interpreter_run(ptx.encode(), *sizes, ctypes.c_uint(shared), int(cooperative), pointers)
    finally:
        for array in arrays:
            library().interpreter_forbid(array.ctypes.data)
    said = error()
    launches()
    if failed:
        raise KernelFaultError(said)
