"""What a config says of Weights & Biases; a module of its own, for who reads a config need not have W&B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpinfer.schema import Checked
from cpinfer.schema import key as _key


@dataclass(frozen=True)
class WandbConfig(Checked):
    """Where the summary of a run is logged."""

    project: str = _key("W&B project", "cpinfer")
    name: str | None = _key("run name; default: the name of the output", None)
    group: str | None = _key("run group", None)
    mode: Literal["auto", "online", "offline"] = _key(
        "auto is online with WANDB_API_KEY, offline without it or where WANDB_MODE says so", "auto"
    )
