"""tools/mismatch.py with real processes: layouts within their limits, tensor parallelism beside its own forward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launching import launch


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_layout_is_within_the_float32_limit(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "tools/mismatch.py", "--config", "configs/single.json", "--output", str(output)]
    command += [
        "--set",
        "sampling.temperature=0.7",
        "--set",
        "sampling.max_new_tokens=8",
        "--set",
        "wandb.mode=offline",
    ]
    finished = launch([*command, "--layouts", "tp1", "pcp2", "tp2_dcp2"], timeout_s=350)
    assert finished.returncode == 0 and finished.summary["ok"], finished
    rows = {(row["name"], row["forward"]): row for row in finished.summary["rows"]}
    judged = [("tp1", "whole"), ("pcp2", "whole"), ("tp2_dcp2", "whole"), ("tp2_dcp2", "tp=2")]
    assert [at for at, row in rows.items() if row["is_judged"]] == judged
    assert all(row["mismatch_max_abs"] <= 1e-4 for row in rows.values())
    assert all(row["num_samples"] == 64 for row in rows.values())
    assert len(list((output / "wandb").glob("offline-run-*"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("bfloat16", {"pcp2": "whole"}),
        ("bfloat16", {"pcp2_dcp1": "whole", "tp2_pcp1": "tp=2"}),
        ("float32", {"pcp2_dcp1": "whole", "tp2_pcp1": "tp=2"}),
    ],
)
def test_deterministic_rollouts_have_every_bit_of_an_invariant_forward(
    dtype: str, layouts: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "tools/mismatch.py", "--config", "configs/single.json", "--output", str(output)]
    for setting in (
        "sampling.temperature=0.7",
        "sampling.max_new_tokens=6",
        "deterministic=true",
        f"dtype={dtype}",
        f"output={tmp_path / 'rollouts.jsonl'}",
    ):
        command += ["--set", setting]
    finished = launch([*command, "--layouts", *layouts], timeout_s=280)
    assert finished.returncode == 0 and finished.summary["ok"], finished
    rows = {(row["name"], row["forward"]): row for row in finished.summary["rows"]}
    for at in layouts.items():
        assert rows[at]["is_judged"] and rows[at]["limit"] == rows[at]["mismatch_max_abs"] == 0.0, rows[at]
    (others,) = (row for row in rows.values() if row["name"] not in layouts and not row["name"].endswith("forward"))
    assert others["mismatch_max_abs"] > 0, "Transformers' generate is another forward"
