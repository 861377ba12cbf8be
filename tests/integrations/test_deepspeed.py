"""DeepSpeed engines that a job already has: their groups and weights are used as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from cpinfer.errors import UnsupportedError
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.deepspeed import launch_inference
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


@pytest.mark.parametrize(("tp_size", "op", "refused"), [(2, object(), True), (2, None, False), (4, object(), False)])
def test_sums_over_all_ranks_are_refused_where_a_group_is_smaller(
    tp_size: int, op: object, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's op for CPU ignores groups. Seen with it, on 4 ranks of tp=2: other tokens than the model's."""

    class PassedError(Exception):
        pass

    def new_group(ranks: object) -> None:
        raise PassedError

    monkeypatch.setattr(deepspeed.comm.comm, "cdb", SimpleNamespace(shm_comm_op=op))
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr("cpinfer_integrations.deepspeed.new_group", new_group)
    with pytest.raises(UnsupportedError if refused else PassedError, match="deepspeed_shm_comm" if refused else ""):
        launch_inference(None, RankGrid(tp_size=tp_size, pcp_size=4 // tp_size), dtype=torch.float32)
