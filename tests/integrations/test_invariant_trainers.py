"""Trainers whose ranks share weights or gradients train by forwards of the bits of their rollouts: DDP, FSDP2, ZeRO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from invariant_tools import run_tools
from torch import nn

import cpinfer
from cpinfer.errors import UserError
from every_family import WITH_STATES
from launching import forked
from tiny_models import FAMILIES

WORKER = "tests/integrations/invariant_worker.py"
DTYPES = ("float32", "bfloat16")
UNDER_TP = ("qwen2", "deepseek_v2", "deepseek_v3")
# Linear attention is refused in the mode.
TRAINABLE = [family for family in FAMILIES if family not in WITH_STATES]
KINDS = ("ddp", "fsdp2:full", "fsdp2:layerwise", "zero2", "zero3:full", "zero3:layerwise")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "cases",
    [
        ("fsdp2:layerwise/deepseek_v2/bfloat16", "zero3:full/qwen2/bfloat16"),
        *(
            pytest.param([f"{kind}/{family}/{dtype}" for family in TRAINABLE for dtype in DTYPES],
                         marks=[pytest.mark.slow, pytest.mark.timeout(1800)], id=f"{kind} of every family")
            for kind in KINDS
        ),
        pytest.param([f"tp2/{family}/{dtype}" for family in UNDER_TP for dtype in DTYPES],
                     marks=pytest.mark.slow, id="tp2"),
        pytest.param([f"tools/{tool_loop}/{dtype}" for tool_loop in ("async", "lockstep") for dtype in DTYPES],
                     marks=pytest.mark.slow, id="tools"),
    ],
)  # fmt: skip
def test_every_step_of_a_trainer_has_the_logprobs_of_its_rollouts(cases: Sequence[str]) -> None:
    finished = forked(2, WORKER, *cases, timeout_s=380 if len(cases) < 4 else 1700)
    assert finished.returncode == 0, finished
    outcomes = finished.summary["outcomes"]
    found = [rank for case in outcomes for rank in case]
    assert [rank["case"] for rank in found] == [case for case in cases for _ in range(2)]
    for rank in found:
        assert set(rank["apart"]) == {0.0}, rank
    assert all(max(rank["otherwise"] for rank in case) > 0 for case in outcomes), "other forwards differ"


SLOW = [pytest.param("lockstep", dtype, marks=pytest.mark.slow) for dtype in DTYPES]


@pytest.mark.parametrize(("tool_loop", "dtype"), [("async", "bfloat16"), *SLOW])
def test_a_trainer_whose_model_calls_tools_has_them_too(tool_loop: str, dtype: str, tmp_path: Path) -> None:
    found = run_tools(tool_loop, dtype, tmp_path)
    assert found["apart"] == [0.0] * 2 and found["otherwise"] > 0


def test_what_is_no_hugging_face_model_is_refused() -> None:
    with (
        pytest.raises(UserError, match="was given a Linear; a Hugging Face model was wanted"),
        cpinfer.invariant_training(nn.Linear(2, 2)),
    ):
        raise AssertionError("it was not refused")
