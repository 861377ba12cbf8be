"""W&B gets the summary; without a key the run stays offline and nothing is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpinfer.config import WandbConfig
from cpinfer_integrations.wandb import log_run


def test_without_a_key_the_summary_is_logged_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    summary = {"num_prompts": 3, "tokens_per_s": 1.5, "layout": {"tp": 1}}
    log_run(WandbConfig(project="p"), {"config": {}}, summary, tmp_path / "results.jsonl", has_api_key=False)
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    data = next(run.glob("*.wandb")).read_bytes()
    assert b"tokens_per_s" in data and b"num_prompts" in data
