"""DeepSpeed engines that a job already has: their groups and weights are used as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.inference.engine import InferenceEngine

from cpinfer.errors import UnsupportedError
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.deepspeed import launch_inference, topology_from
from launching import forked


def outcome_of(kind: str, num_ranks: int, tp_size: int) -> dict[str, Any]:
    worker = "tests/integrations/deepspeed_worker.py"
    finished = forked(num_ranks, worker, kind, str(tp_size), timeout_s=100)
    assert finished.returncode == 0, finished
    return finished.summary


@pytest.mark.parametrize(
    ("kind", "num_ranks", "tp_size", "grid"),
    [
        ("inference", 2, 2, [2, 1, 1, 1]),
        pytest.param("training", 2, 1, [1, 2, 2, 1], marks=pytest.mark.slow),
        ("training", 4, 2, [2, 2, 2, 1]),
    ],
)
def test_an_existing_engine_generates_on_its_own_weights_and_groups(
    kind: str, num_ranks: int, tp_size: int, grid: list[int]
) -> None:
    outcome = outcome_of(kind, num_ranks, tp_size)
    assert outcome["grid"] == grid
    assert all(outcome["same_tokens"]), outcome
    # Where copies of weights were granted, all projections of two layers and the head ran by them, AutoTP's shards too.
    assert outcome["num_prepacked"] == (15 if kind == "inference" else 0), outcome
    assert outcome["weights_untouched"] and outcome["modes_restored"], outcome
    assert outcome["hooks_untouched"] and outcome["attention_restored"], outcome
    assert outcome["tp_group_is_the_engines"], outcome
    # Data-parallel ranks become the pcp axis on the engine's own group, so there is nothing to create at all.
    assert outcome["created"] == [], outcome


def job_with_op(monkeypatch: pytest.MonkeyPatch, op: object) -> None:
    """A job of 4 ranks that has called `deepspeed.init_distributed` itself, and has DeepSpeed's op or not."""
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", SimpleNamespace(shm_comm_op=op))
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4 if group is None else group)


class PassedError(Exception):
    """It was not refused."""


def fail(*_: object, **__: object) -> None:
    raise PassedError


CASES = [(2, object(), UnsupportedError), (2, None, PassedError), (4, object(), PassedError)]


@pytest.mark.parametrize(("tp_size", "op", "error"), CASES)
def test_sums_over_all_ranks_are_refused_before_a_model_is_cut(
    tp_size: int, op: object, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's op for CPU ignores groups. Seen with it, on 4 ranks of tp=2: a hang, or other tokens."""
    job_with_op(monkeypatch, op)
    monkeypatch.setattr("cpinfer_integrations.deepspeed.new_group", fail)
    with pytest.raises(error, match="deepspeed_shm_comm" if error is UnsupportedError else None):
        launch_inference(None, RankGrid(tp_size=tp_size, pcp_size=4 // tp_size), dtype=torch.float32)


@pytest.mark.parametrize(("tp_size", "op", "error"), CASES)
def test_sums_over_all_ranks_are_refused_of_an_engine_that_is_there(
    tp_size: int, op: object, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_with_op(monkeypatch, op)
    monkeypatch.setattr("cpinfer_integrations.deepspeed.RankGrid", SimpleNamespace(lending=fail))
    engine = InferenceEngine.__new__(InferenceEngine)
    engine.__dict__["mp_group"] = tp_size
    with pytest.raises(error, match="deepspeed_shm_comm" if error is UnsupportedError else None):
        topology_from(engine)


def test_a_training_engine_sums_by_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    job_with_op(monkeypatch, object())
    monkeypatch.setattr("cpinfer_integrations.deepspeed.RankGrid", SimpleNamespace(lending=fail))
    groups = SimpleNamespace(get_tensor_model_parallel_group=lambda: 2, get_data_parallel_group=lambda: 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(PassedError):
        topology_from(SimpleNamespace(autotp_size=lambda: 2, mpu=groups))
