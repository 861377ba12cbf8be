"""The collector of cycles stays away from what the whole run keeps: modules, and some ten thousand collected tests.

It would go through them again and again: for half of the time that collecting takes, and later in small tests.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
