"""The registry of backends: a row is all that a new one takes; who is asked for, and what `auto` says of it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpinfer.attention.backends import registry
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.registry import BACKENDS, BackendRow, check_choice, make_backend
from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.errors import UserError

CPU = torch.device("cpu")
NEEDS = AttentionNeeds(torch.float32, ())


class Trial(TorchBackend):
    name = "trial"


@pytest.fixture
def with_trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry with a row for a backend of one file, which is `unfit` for the reason that it is given."""

    def rows(unfit: UserError | None = None, device_types: frozenset[str] | None = None) -> dict[str, BackendRow]:
        file = SimpleNamespace(unfit=lambda device, needs: unfit, make=lambda device, needs: Trial(device))
        monkeypatch.setitem(sys.modules, "trial_backend", file)
        return {"trial": BackendRow("trial_backend", device_types), **BACKENDS}

    return rows


def test_a_row_is_all_that_a_new_backend_takes(with_trial: Any) -> None:
    assert make_backend("trial", CPU, NEEDS, with_trial()).name == "trial"
    assert make_backend("auto", CPU, NEEDS, with_trial()).name == "trial"
    with pytest.raises(UserError, match='unknown backend "trial"'):
        make_backend("trial", CPU, NEEDS)


def test_auto_passes_over_what_cannot_and_says_why_where_it_is_made_for_the_device(with_trial: Any) -> None:
    unfit = UserError("it lacks a kernel.")
    with pytest.warns(UserWarning, match="torch alone, which is slow on CPU: it lacks a kernel"):
        assert make_backend("auto", CPU, NEEDS, with_trial(unfit)).name == "torch"
    # Nobody who is on another device wants to hear of it.
    assert make_backend("auto", CPU, NEEDS, with_trial(unfit, frozenset({"cuda"}))).name == "torch"
    with pytest.raises(UserError, match="it lacks a kernel"):
        check_choice("trial", CPU, NEEDS, with_trial(unfit))


def test_where_no_row_can_all_reasons_are_told(with_trial: Any) -> None:
    rows = with_trial(UserError("it lacks a kernel."))
    with pytest.raises(UserError, match="no backend can do what is needed: it lacks a kernel"):
        make_backend("auto", CPU, NEEDS, {"trial": rows["trial"]})


def test_a_name_near_a_known_one_is_named() -> None:
    with pytest.raises(UserError, match='the nearest known backend is "flashinfer"'):
        check_choice("flash_infer", CPU, NEEDS)


def test_no_backend_is_imported_before_it_is_asked_for() -> None:
    name = registry.__name__
    code = f"import sys, {name}; print([row.module in sys.modules for row in {name}.BACKENDS.values()])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert found.stdout.strip() == str([False] * len(BACKENDS))
