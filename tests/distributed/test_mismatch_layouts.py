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
