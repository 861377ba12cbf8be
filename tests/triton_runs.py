"""Triton kernels without a GPU: run by its interpreter, or compiled for a device that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def output_of(code: str, *, timeout_s: float = 100, **environment: str) -> Any:
    """What `code` prints last, read as JSON: in a process of its own, since Triton reads its settings on import."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def sum_dots_in_order() -> None:
    """In this process, Triton's interpreter adds up each number of a product of tiles by itself, one k after another.

    As it is it asks numpy, which takes bfloat16 for integers, and whose library gives a row of a tile other bits at
    another place, which no GPU is known to do.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    def wide(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return _convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return x.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        products = wide(a)[:, :, None] * wide(b)[None]
        return TensorHandle(d.data + np.add.reduce(products, axis=1), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def force_triton() -> None:
    """In this process the deterministic mode runs its Triton kernels, one at a time, by the interpreter on CPU.

    The interpreter changes Triton's modules while a kernel runs: other threads wait.
    """
    from cpinfer.ops import ordered_attention, ordered_kernels, row_kernels, row_reductions, row_sizes

    sum_dots_in_order()
    lock = threading.Lock()
    ordered, by_rows = _OneAtATime(ordered_kernels, lock), _OneAtATime(row_kernels, lock)

    def kernels_for(*tensors: Any) -> Any:
        return by_rows if all(x.is_floating_point() and x.dtype.itemsize < 8 for x in tensors) else None

    ordered_attention._kernels_for = lambda x: ordered
    row_reductions._kernels_for = row_sizes._kernels_for = kernels_for


class _OneAtATime:
    """A module whose functions have a lock."""

    def __init__(self, module: Any, lock: threading.Lock) -> None:
        self._module, self._lock = module, lock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, type):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return found(*args, **kwargs)

        return call


def compiled(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], num_warps: int = 1) -> Any:
    """`kernel` as compiled for Hopper, its arguments int32 but for `pointers` and `constants`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
