"""The config of what people run: a job's, and what tools alone read. The same JSON file serves both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cpinfer.config import LaunchConfig, load_as, parse_as
from cpinfer.config_file import path_from
from cpinfer.errors import UserError
from cpinfer.models.loading import model_sampling
from cpinfer.schema import Bounds, Checked, require
from cpinfer.schema import key as _key
from cpinfer_integrations.server_config import ServerConfig
from cpinfer_integrations.wandb_config import WandbConfig


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What `tools/eval_longctx.py` asks a model."""

    tasks: tuple[str, ...] = _key("long-context tasks, made from a seed; all of them when empty", ())
    task_file: str | None = _key("questions, JSON Lines (relative to the config file), instead of `tasks`", None)
    lengths: tuple[int, ...] = _key("tokens of a prompt and its answer together", (4096,), within=Bounds(1, 2**30))
    num_samples: int | None = _key(
        "samples per task and length; default: 10, or all of a file", None, within=Bounds(1, 10**5)
    )
    depths: tuple[float, ...] = _key(
        "where the needle lies, as shares of the haystack; samples take them in turn",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        within=Bounds(0, 1),
    )
    seeds: tuple[int, ...] = _key("sampling seeds: each is one run over all samples", (0,), within=Bounds(0, 2**64 - 1))
    num_shots: int = _key(
        "examples before each question of a gsm8k file, from its first lines", 5, within=Bounds(0, 10**5)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.tasks and self.task_file), "task_file", self.task_file, "left out where `tasks` are named")
        for name in ("lengths", "depths", "seeds"):
            require(bool(getattr(self, name)), name, getattr(self, name), "a list of one or more")
        for name in ("tasks", "lengths", "depths", "seeds"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "free of repetitions")


@dataclass(frozen=True)
class ComparisonConfig(Checked):
    """What `tools/compare.py` makes of an evaluation: the same one over several layouts."""

    layouts: tuple[str, ...] = _key('names such as "tp4_pcp2_dcp4", or configs; the first is the reference', ())
    tolerance: float | None = _key(
        "largest logprob difference that passes; default: 1e-4 in float32, 0.05 in half precision",
        None,
        within=Bounds(0, 1e6),
    )


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """What `tools/train_grpo.py` trains, and how."""

    reward: str = _key('a reward of the tool, or "FILE.py:FUNCTION" as TRL calls it (relative to the config file)', "")
    num_steps: int = _key("optimiser steps", 100, within=Bounds(1, 10**8))
    learning_rate: float = _key("of AdamW, constant", 1e-6, within=Bounds(0, 1e3, above_low=True))
    batch_size: int = _key("samples per process and step", 8, within=Bounds(1, 2**16))
    num_generations: int = _key(
        "samples per prompt: the group that rewards are compared in", 8, within=Bounds(2, 2**16)
    )
    kl_coef: float = _key(
        "weight of the KL to the model before training, which is kept beside it; 0 keeps none, LoRA needs none",
        0.0,
        within=Bounds(0, 1e6),
    )
    entropy_coef: float = _key("weight of the entropy bonus", 0.0, within=Bounds(0, 1e6))
    zero_stage: Literal[0, 1, 2, 3] | None = _key("DeepSpeed ZeRO stage; null trains with DDP, without DeepSpeed", 0)
    lora_rank: int = _key(
        "train a LoRA adapter of this rank on all linear layers; 0 trains all weights", 0, within=Bounds(0, 2**16)
    )
    fresh_weights: bool = _key(
        "start from random weights instead of the model's; with `kl_coef` they are written to initial/ beside the "
        "output, for the second model",
        False,
    )
    generator: Literal["cpinfer", "transformers"] = _key("who generates the rollouts", "cpinfer")
    seed: int = _key(
        "of weights, order of prompts and, with `sampling.seed`, of samples: GRPOConfig's seed",
        0,
        within=Bounds(0, 2**31 - 1),
    )


@dataclass(frozen=True)
class RunConfig(LaunchConfig):
    """Everything a tool needs to know: the keys above, and what only tools read."""

    generation_config: Literal["ignore", "model"] = _key(
        "where `sampling` says nothing: `ignore` takes the defaults named here, `model` what the model's "
        "generation_config.json says",
        "ignore",
    )
    input: str | None = _key("prompts, JSON Lines (relative to the config file)", None)
    output: str | None = _key("results, JSON Lines; default: a new folder under runs/", None)
    evaluation: EvaluationConfig = _key("long-context evaluation", factory=EvaluationConfig)
    comparison: ComparisonConfig = _key("comparison of layouts", factory=ComparisonConfig)
    training: TrainingConfig = _key("reinforcement learning with TRL", factory=TrainingConfig)
    server: ServerConfig = _key("HTTP server", factory=ServerConfig)
    wandb: WandbConfig | None = _key(
        "log to W&B: an object with `project`, `name`, `group`, `mode`; without it nothing is", None
    )

    def seen_from(self, folder: Path) -> Self:
        reward, task_file = self.training.reward, self.evaluation.task_file
        return dataclasses.replace(
            super().seen_from(folder),
            input=path_from(folder, self.input),
            output=path_from(folder, self.output),
            evaluation=dataclasses.replace(self.evaluation, task_file=path_from(folder, task_file)),
            training=dataclasses.replace(self.training, reward=path_from(folder, reward) if ":" in reward else reward),
        )


def load_run_config(
    path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """What a config file says to a tool: `load_as` with a `RunConfig`, over the model's sampling where it asks for it.

    UserError also for a generation_config of the model that cpinfer does not know all of.
    """
    config = load_as(RunConfig, path, overrides, defaults)
    if config.generation_config == "ignore" or config.model is None:
        return config
    defaults = defaults or {}
    try:
        sampling = {**defaults.get("sampling", {}), **model_sampling(config.model)}
    except UserError as error:
        raise type(error)(f"config {path}: {error}") from error
    return load_as(RunConfig, path, overrides, {**defaults, "sampling": sampling})


def parse_run_config(data: Mapping[str, Any]) -> RunConfig:
    """What plain data says to a tool: `parse_as` with a `RunConfig`."""
    return parse_as(RunConfig, data)
