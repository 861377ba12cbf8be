"""Weights & Biases: the summary of a run, beside the local files that hold the same and more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from cpinfer.config import WandbConfig


def log_run(
    config: WandbConfig, meta: Mapping[str, Any], summary: Mapping[str, Any], output: Path, *, has_api_key: bool
) -> None:
    """One W&B run with the resolved config and the summary; its files lie beside `output`.

    Mode `auto` is online with an API key and offline without.
    """
    mode = config.mode if config.mode != "auto" else "online" if has_api_key else "offline"
    run = wandb.init(
        project=config.project,
        name=config.name or output.parent.name,
        group=config.group,
        mode=mode,
        dir=str(output.parent),
        config=dict(meta),
        settings=wandb.Settings(silent=True),
    )
    run.summary.update({key: value for key, value in summary.items() if not isinstance(value, dict)})
    run.finish()
