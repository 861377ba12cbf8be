"""The registry of backends: a row is all that a new one takes; who is asked for, and what `auto` says of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cpinfer
from cpinfer.attention.backends import registry
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.registry import BACKENDS, BackendRow, backend_bytes, check_choice, make_backend
from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.attention.exchanges.registry import EXCHANGES
from cpinfer.comm.threads import run_ranks
from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

CPU = torch.device("cpu")
NEEDS = AttentionNeeds(torch.float32, ())


class Trial(TorchBackend):
    name = "trial"


@pytest.fixture
def with_trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry with a row for a backend of one file, which is `unfit` for the reason that it is given."""

    def rows(unfit: UserError | None = None, device_types: frozenset[str] | None = None) -> dict[str, BackendRow]:
        file = SimpleNamespace(
            unfit=lambda device, needs: unfit,
            make=lambda device, needs: Trial(device),
            device_bytes=lambda device, needs: 7,
        )
        monkeypatch.setitem(sys.modules, "trial_backend", file)
        return {"trial": BackendRow("trial_backend", device_types), **BACKENDS}

    return rows


def test_a_row_is_all_that_a_new_backend_takes(with_trial: Any) -> None:
    assert make_backend("trial", CPU, NEEDS, with_trial()).name == "trial"
    assert make_backend("auto", CPU, NEEDS, with_trial()).name == "trial"
    with pytest.raises(UserError, match='unknown backend "trial"'):
        make_backend("trial", CPU, NEEDS)


def test_what_a_backend_keeps_on_the_device_is_asked_of_the_one_that_would_be_taken(with_trial: Any) -> None:
    assert backend_bytes("auto", CPU, NEEDS, with_trial()) == backend_bytes("trial", CPU, NEEDS, with_trial()) == 7
    assert backend_bytes("auto", CPU, NEEDS, with_trial(UserError("it lacks a kernel."))) == 0


def test_auto_passes_over_what_cannot_and_says_why_where_it_is_made_for_the_device(with_trial: Any) -> None:
    unfit = UserError("it lacks a kernel.")
    with pytest.warns(UserWarning, match="runs on cpu, which is slower on CPU: it lacks a kernel"):
        assert make_backend("auto", CPU, NEEDS, with_trial(unfit)).name == "cpu"
    # Nobody who is on another device wants to hear of it.
    assert make_backend("auto", CPU, NEEDS, with_trial(unfit, frozenset({"cuda"}))).name == "cpu"
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


@pytest.mark.parametrize(("key", "names"), [("backend", ["auto", *BACKENDS]), ("decode_exchange", [*EXCHANGES])])
def test_the_key_says_what_there_is_to_choose_from(key: str, names: list[str]) -> None:
    text = EngineConfig.__dataclass_fields__[key].metadata["help"]
    assert all(f"`{name}`" in text for name in names)


class TrialExchange(AllToAllExchange):
    """A file of its own, as far as anybody can tell."""


def tokens(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """Of two prompts, decoded over two KV shards."""
    model = make_model(FAMILIES["llama"])

    def body(topology: Any) -> list[tuple[int, ...]]:
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            prompts = prompts_of((9, 14), vocab_size=128)
            return [
                tuple(r.token_ids) for r in engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=6))
            ]

    return run_ranks(RankGrid(1, 2, 2), body)[0]


def test_a_whole_engine_runs_on_a_row_that_was_added(monkeypatch: pytest.MonkeyPatch, with_trial: Any) -> None:
    """Nothing else knows which backends and exchanges there are: no list, no key's type, no ladder."""
    chosen = {"backend": "trial", "decode_exchange": "trial"}
    with pytest.raises(UserError, match="unknown decode_exchange"):
        tokens({"decode_exchange": "trial"})
    with pytest.raises(UserError, match="unknown backend"):
        tokens({"backend": "trial"})
    monkeypatch.setitem(BACKENDS, "trial", with_trial()["trial"])
    monkeypatch.setitem(EXCHANGES, "trial", TrialExchange)
    assert tokens(chosen) == tokens({})
