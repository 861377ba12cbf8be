"""Grids of cases, of which fast tests run as many as try each value once, and slow tests the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def pairs(first: Sequence[Any], second: Sequence[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """All pairs, for `parametrize`, as `[first-second]`; `name` is that of what is neither text nor number.

    Slow are those whose first value is marked so, and of the rest all but a diagonal:

        first 0 1 2 3, second 0 1      fast  0-0 1-1 2-0 3-1      slow  0-1 1-0 2-1 3-0
    """
    period, found = min(len(first), len(second)), []
    for i, a in enumerate(first):
        value, marked = (a.values[0], bool(a.marks)) if hasattr(a, "marks") else (a, False)
        for j, b in enumerate(second):
            marks = [pytest.mark.slow] if marked or (i - j) % period else []
            names = (str(x) if isinstance(x, str | int) else name(x) for x in (value, b))
            found.append(pytest.param(value, b, marks=marks, id="-".join(names)))
    return found
