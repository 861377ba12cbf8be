"""Real trainers lend their weights for a phase: the answers are those of the weights, and training never notices."""

from __future__ import annotations

from typing import Any

import pytest

from launching import launch, torchrun

WORKER = "tests/integrations/lending_worker.py"


def outcomes_of(*kinds: str, num_ranks: int = 2, timeout_s: float = 110) -> list[dict[str, Any]]:
    finished = launch(torchrun(num_ranks, WORKER, *kinds), timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    outcomes = [of_rank for kind in finished.summary["outcomes"] for of_rank in kind]
    assert len(outcomes) == len(kinds) * num_ranks
    return outcomes


def check(outcome: dict[str, Any]) -> None:
    for phase in outcome["phases"]:
        assert all(phase["same_tokens"]) and phase["worst"] < 1e-4, outcome
        assert phase["changed"] == [], outcome
    # Trained on, bit for bit, as if there had been no phase: before the first step, and between backward and step.
    assert len(outcome["phases"]) == 2 and outcome["same_losses"] and outcome["same_weights"], outcome


@pytest.mark.parametrize(
    "kinds",
    [
        ("zero3:full", "zero3:layerwise", "zero3:tp_shards"),
        ("zero2", "ddp", "fsdp2:full", "fsdp2:layerwise"),
        pytest.param(("zero0", "zero1"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_training_goes_on_bit_for_bit_after_exact_rollouts_on_its_weights(kinds: tuple[str, ...]) -> None:
    outcomes = outcomes_of(*kinds)
    for outcome in outcomes:
        check(outcome)
