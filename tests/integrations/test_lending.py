"""Real trainers lend their weights for a phase: the answers are those of the weights, and training never notices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from cpinfer.config import JobConfig
from cpinfer.errors import UnsupportedError
from cpinfer_integrations import deepspeed as by_deepspeed
from launching import forked

WORKER = "tests/integrations/lending_worker.py"
MIB = 2**20
ON_CPU = {"ACCELERATE_USE_CPU": "true"}

# Few launches with many jobs each: most of a launch is imports.
DEEPSPEED = ("zero2", "zero3:full", "zero3:layerwise", "zero3:tp_shards")
DEEPSPEED_COSTS = ("costs zero2", "costs zero3:full", "costs zero3:layerwise", "costs zero3:tp_shards")
PLAIN = ("ddp", "fsdp2:full", "fsdp2:layerwise", "accelerate-ddp", "accelerate-fsdp2:layerwise")
PLAIN_COSTS = ("costs ddp", "costs fsdp2:full", "costs fsdp2:layerwise")
MIXED = ("accelerate-ddp+bf16", "accelerate-fsdp2:layerwise+bf16", "accelerate-fsdp2:full+bf16")
# Linear attention, prompts split over both ranks; of experts and of Kimi's kind where ZeRO-3 gathers most.
HYBRID_DEEPSPEED = (
    *(f"qwen3_next/{kind}" for kind in ("zero2", "zero3:full", "zero3:layerwise")),
    *(f"{family}/zero3:layerwise" for family in ("olmo_hybrid", "kimi_linear")),
)
HYBRID_PLAIN = (
    *(f"qwen3_5_text/{kind}" for kind in ("ddp", "fsdp2:full", "fsdp2:layerwise", "accelerate-fsdp2:layerwise")),
    *(f"{family}/fsdp2:layerwise" for family in ("qwen3_next", "olmo_hybrid", "kimi_linear")),
)
# Of 4 values, here experts' biases and heads' decays, FSDP gives 3 ranks 2, 2 and none.
FEW_VALUES = ("gpt_oss/fsdp2:layerwise", "qwen3_next/fsdp2:layerwise")
HYBRID_MIXED = tuple(f"qwen3_5_text/{kind}" for kind in MIXED)

Outcomes = dict[str, list[dict[str, Any]]]


def outcomes_of(
    kinds: tuple[str, ...], num_ranks: int = 2, env: Mapping[str, str] | None = None, timeout_s: float = 280
) -> Outcomes:
    """By kind, what every rank found."""
    finished = forked(num_ranks, WORKER, *kinds, timeout_s=timeout_s, env=env)
    assert finished.returncode == 0, finished
    return dict(zip(kinds, finished.summary["outcomes"], strict=True))


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Of everything that runs by default."""
    of_deepspeed = outcomes_of((*DEEPSPEED, *DEEPSPEED_COSTS, "refusals"))
    return of_deepspeed | outcomes_of(PLAIN + PLAIN_COSTS + MIXED, env=ON_CPU)


def check_training(outcome: dict[str, Any]) -> None:
    for phase in outcome["phases"]:
        assert all(phase["same_tokens"]) and phase["worst"] < 1e-4, outcome
        assert phase["changed"] == [], outcome
    # Trained on, bit for bit, as if there had been no phase: before the first step, and between backward and step.
    assert len(outcome["phases"]) == 2 and outcome["same_losses"] and outcome["same_weights"], outcome


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", DEEPSPEED + PLAIN)
def test_training_goes_on_bit_for_bit_after_exact_rollouts_on_its_weights(kind: str, outcomes: Outcomes) -> None:
    for outcome in outcomes[kind]:
        check_training(outcome)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", DEEPSPEED_COSTS + PLAIN_COSTS)
def test_a_phase_that_fails_in_the_middle_of_a_layer_leaves_the_job_as_it_was(kind: str, outcomes: Outcomes) -> None:
    for outcome in outcomes[kind]:
        assert {fault["error"] for fault in outcome["faults"]} == {"StopHereError", "KeyboardInterrupt"}
        for fault in outcome["faults"]:
            assert fault["raised"] and fault["changed"] == [] and fault["trains_on"], outcome


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [kind for kind in DEEPSPEED_COSTS + PLAIN_COSTS if "fsdp2" not in kind])
def test_a_phase_takes_the_weights_in_use_the_kv_pool_and_bounded_scratch(kind: str, outcomes: Outcomes) -> None:
    for outcome in outcomes[kind]:
        phase, model_bytes, layer_bytes = outcome["phase"], outcome["model_bytes"], outcome["layer_bytes"]
        in_place = phase["how"] == "in_place"
        bound = phase["kv_pool_bytes"] + 0.6 * MIB + (0 if in_place else phase["weights_bytes"])
        if phase["how"] == "tp_shards":
            bound += layer_bytes  # one layer is whole while it is cut
            assert phase["weights_bytes"] < 0.6 * model_bytes, outcome
        elif phase["how"] == "layerwise":
            # gloo's thread lets go of what it has gathered a moment after it has said so, in one of three times late.
            bound += layer_bytes
            assert phase["weights_bytes"] < 0.4 * model_bytes, outcome
        else:
            assert phase["weights_bytes"] == model_bytes, outcome
            # The control: a second copy of the weights would be seen.
            assert outcome["with_a_copy"]["peak_bytes"] > bound + 0.9 * model_bytes, outcome
        assert phase["peak_bytes"] <= bound, outcome
        assert phase["left_bytes"] < 1024, outcome
        assert phase["gather_s"] > 0 and phase["release_s"] > 0, outcome


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [kind for kind in DEEPSPEED_COSTS + PLAIN_COSTS if "fsdp2" not in kind])
def test_steps_read_the_trainers_storages_or_the_gathered_ones(kind: str, outcomes: Outcomes) -> None:
    for outcome in outcomes[kind]:
        phase = outcome["phase"]
        assert phase["all_weights_are_used_where_they_are"], outcome
        assert phase["pointers_are_the_trainers"] == (phase["how"] == "in_place"), outcome


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", MIXED)
def test_mixed_precision_is_that_of_the_training_forward(kind: str, outcomes: Outcomes) -> None:
    for outcome in outcomes[kind]:
        # One bfloat16 step at these logits is 3e-2; float32 rollouts would be 2e-2 off on average.
        assert outcome["changed"] == [] and outcome["mean_abs"] < 8e-3, outcome


REFUSED = {
    "layerwise with replicas": r'2 replicas: .*"layerwise" with several replicas',
    "fsdp2 layerwise with replicas": r'2 replicas: .*"layerwise" with several replicas',
    "tp_shards of zero2": r"ZeRO stage 2, .*not sharded by ZeRO-3 alone",
    "tp_shards of fsdp2": r"an FSDP2 model: .*not sharded by ZeRO-3 alone",
    "tp_shards of ddp": r"DistributedDataParallel: .*not sharded by ZeRO-3 alone",
    "tp_shards without tp": r"tp_size 1; give",
    "tp_shards of fused heads": r"gpt_bigcode.*families whose heads",
    "fsdp2 of a module around": r"a FSDPSequential: .*FSDP2 whose outermost",
    "a model in such a module": r"embed_tokens.weight of a Qwen2.*sharded by a module around it: .*whose outermost",
    "fsdp1": r"FSDP1 .*Use FSDP2",
    "fsdp2 with tp": r"axes dp, tp: .*FSDP2 together with tensor parallelism",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_lent_is_refused_by_name_on_every_rank(asked: str, outcomes: Outcomes) -> None:
    for outcome in outcomes["refusals"]:
        assert re.search(REFUSED[asked], outcome["refused"][asked]), outcome["refused"][asked]


@pytest.mark.timeout(300)
def test_a_photograph_shows_what_deepspeeds_hooks_would_do_in_a_phase(outcomes: Outcomes) -> None:
    """The control: they write into the trace, and leave other parameters whole than were."""
    for outcome in outcomes["refusals"]:
        assert {"parameters", "coordinator"} <= set(outcome["awake"]), outcome


def test_autocast_around_an_engines_forward_is_refused_by_name() -> None:
    engine = SimpleNamespace(torch_autocast_enabled=lambda: True)
    with pytest.raises(UnsupportedError, match=r"DeepSpeed's torch_autocast"):
        by_deepspeed.lend(engine, JobConfig())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("num_ranks", "kinds"),
    [
        (2, ("zero0", "zero1", "zero0+autotp", "zero1+autotp", "zero2+autotp", "zero3:full+autotp")),
        (4, ("zero2+autotp", "zero3:layerwise+autotp")),
    ],
)
def test_other_stages_and_ranks_of_training_autotp_lend_as_well(num_ranks: int, kinds: tuple[str, ...]) -> None:
    for of_ranks in outcomes_of(kinds, num_ranks).values():
        for outcome in of_ranks:
            check_training(outcome)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_weights_of_which_fsdp_gives_some_ranks_nothing_lend_as_well() -> None:
    for of_ranks in outcomes_of(FEW_VALUES, 3, env=ON_CPU).values():
        for outcome in of_ranks:
            check_training(outcome)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_models_of_linear_attention_lend_as_well() -> None:
    found = outcomes_of(HYBRID_DEEPSPEED)
    found |= outcomes_of(HYBRID_PLAIN + HYBRID_MIXED, env=ON_CPU, timeout_s=400)
    for kind, of_ranks in found.items():
        for outcome in of_ranks:
            if kind in HYBRID_MIXED:
                assert outcome["changed"] == [] and outcome["mean_abs"] < 8e-3, outcome
            else:
                check_training(outcome)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_latent_attention_experts_and_adapters_are_gathered_every_way_under_zero3() -> None:
    for outcome in outcomes_of(("families",))["families"]:
        assert len(outcome["cases"]) == 8
        for case in outcome["cases"]:
            assert all(case["same_tokens"]) and case["worst"] < 1e-4 and case["changed"] == [], case
            assert case["num_other_experts"] == (None if "lora" in case["name"] else 0), case


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_models_of_other_shapes_lend_as_well_or_are_refused_by_name() -> None:
    for outcome in outcomes_of(("shapes",))["shapes"]:
        assert len(outcome["cases"]) == 10
        for name, case in outcome["cases"].items():
            assert all(case["same_tokens"]) and case["worst"] < 1e-4, (name, case)
            assert case["changed"] == [] and case["trains_on"], (name, case)
        # Attention is in the precision in which FSDP brings the layers.
        half = outcome["bfloat16"]
        assert half["cached_bytes_per_value"] == 2 and half["off_by"] < half["float32_off_by"] / 2, half
        refused = outcome["refused"]
        assert re.search(r"FSDPValueHead: .*a wrapper that is no PeftModel", refused["a value head sharded"])
        assert re.search(r"tp=2, the config says tp=1. Leave .* set it to 2", refused["another tp than the mesh's"])
