"""DeepSpeed engines that a job already has: their groups and weights are used as they are."""

from __future__ import annotations

from typing import Any

import pytest

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
