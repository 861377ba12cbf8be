"""Modules of Triton kernels, where Triton is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any


@functools.cache
def triton_module(name: str) -> Any:
    """The module `cpinfer.ops.<name>`, imported when it is first wanted; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"cpinfer.ops.{name}")
