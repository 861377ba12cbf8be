"""Real trainers lend their weights for a phase: the answers are those of the weights, and training never notices."""

from __future__ import annotations

from typing import Any

import pytest

from launching import accelerate, launch, torchrun

WORKER = "tests/integrations/lending_worker.py"
COSTS_WORKER = "tests/integrations/lending_costs_worker.py"


def outcomes_of(*kinds: str, num_ranks: int = 2, timeout_s: float = 110, worker: str = WORKER) -> list[dict[str, Any]]:
    finished = launch(torchrun(num_ranks, worker, *kinds), timeout_s=timeout_s)
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


def test_accelerates_ddp_and_fsdp2_lend_as_well_and_mixed_precision_is_that_of_the_training_forward() -> None:
    kinds = ("accelerate-ddp", "accelerate-fsdp2:layerwise", "accelerate-ddp+bf16", "accelerate-fsdp2:layerwise+bf16")
    command = accelerate(2, WORKER, *kinds)
    finished = launch(command, timeout_s=110, env={"ACCELERATE_USE_CPU": "true"})
    assert finished.returncode == 0, finished
    for outcome in (of_rank for kind in finished.summary["outcomes"] for of_rank in kind):
        if outcome["kind"].endswith("+bf16"):
            # One bfloat16 step at these logits is 3e-2; float32 rollouts would be 2e-2 off on average.
            assert outcome["changed"] == [] and outcome["mean_abs"] < 8e-3, outcome
        else:
            check(outcome)


MIB = 2**20


def test_a_phase_takes_the_weights_in_use_the_kv_pool_and_bounded_scratch_and_a_failed_one_leaves_nothing() -> None:
    kinds = ("zero2", "ddp", "zero3:full", "zero3:layerwise", "zero3:tp_shards", "fsdp2:full", "fsdp2:layerwise")
    for outcome in outcomes_of(*kinds, worker=COSTS_WORKER):
        for fault in outcome["faults"]:
            assert fault["raised"] and fault["changed"] == [] and fault["trains_on"], outcome
        if "phase" not in outcome:
            continue
        phase, model_bytes, layer_bytes = outcome["phase"], outcome["model_bytes"], outcome["layer_bytes"]
        in_place = phase["how"] == "in_place"
        assert phase["all_weights_are_used_where_they_are"], outcome
        assert phase["pointers_are_the_trainers"] == in_place, outcome
        bound = phase["kv_pool_bytes"] + 0.6 * MIB + (0 if in_place else phase["weights_bytes"])
        if phase["how"] == "tp_shards":
            bound += layer_bytes  # one layer is whole while it is cut
            assert phase["weights_bytes"] < 0.6 * model_bytes, outcome
        elif phase["how"] == "layerwise":
            assert phase["weights_bytes"] < 0.4 * model_bytes, outcome
        else:
            assert phase["weights_bytes"] == model_bytes, outcome
        assert phase["peak_bytes"] <= bound, outcome
        # Nothing stays behind.
        assert phase["left_bytes"] < 1024, outcome
        # The control: a second copy of the weights would be seen.
        if phase["how"] in ("in_place", "full"):
            assert outcome["with_a_copy"]["peak_bytes"] > bound + 0.9 * model_bytes, outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "kinds"),
    [
        (2, ("zero0+autotp", "zero1+autotp", "zero2+autotp", "zero3:full+autotp")),
        (4, ("zero2+autotp", "zero3:layerwise+autotp")),
    ],
)
def test_ranks_of_training_autotp_lend_with_every_zero_stage(num_ranks: int, kinds: tuple[str, ...]) -> None:
    for outcome in outcomes_of(*kinds, num_ranks=num_ranks, timeout_s=200):
        check(outcome)
