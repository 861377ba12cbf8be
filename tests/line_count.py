"""What a call costs, in lines of Python: a measure of how it grows that no clock and no neighbour disturbs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines_run(call: Callable[[], Any], within: str | tuple[str, ...] = "") -> int:
    """How many lines of Python `call` runs, in files whose path ends with `within`."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line" and frame.f_code.co_filename.endswith(within)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
