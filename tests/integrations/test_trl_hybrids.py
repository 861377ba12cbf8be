"""TRL's GRPOTrainer over models of linear attention: every step's rollouts begin from states of its own weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl import CONFIG, TINY, make_trainer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
from trl import GRPOTrainer

from cpinfer.kv_cache.state_store import StateStore
from cpinfer.models.families import FAMILIES as TABLE
from cpinfer_integrations.trl import make_rollout_func, with_cpinfer
from every_family import WITH_STATES
from tiny_models import FAMILIES, SETTINGS
from tiny_models import TINY as TINY_SHAPE

HYBRIDS = sorted(WITH_STATES)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def records(tokenizer: Any, folder: Path, family: str, how: str, **options: Any) -> list[Any]:
    """Of the phases of three steps, each with weights that it alone has."""
    shape = {**TINY_SHAPE, **SETTINGS[family], "vocab_size": len(tokenizer)}
    rollouts = make_rollout_func(CONFIG) if how == "rollout_func" else None
    trainer = make_trainer(
        tokenizer,
        folder,
        rollouts,
        config=AutoConfig.for_model(family, **shape),
        trainer_class=GRPOTrainer if rollouts else with_cpinfer(GRPOTrainer, CONFIG),
        temperature=0.7,
        max_completion_length=12,
        **options,
    )
    before = [x.detach().clone() for x in trainer.model.parameters()]
    trainer.train()
    moved = [bool((x != y).any()) for x, y in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved), "experts that no token went through stay"
    found: list[Any] = (rollouts or trainer.rollouts).records
    assert [record.weights_version for record in found] == [0, 1, 2]
    return found


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("qwen3_5_text", "rollout_func"),
        *(
            pytest.param(family, how, marks=pytest.mark.slow)
            for family in HYBRIDS
            for how in ("rollout_func", "with_cpinfer")
            if (family, how) != ("qwen3_5_text", "rollout_func")
        ),
    ],
)
def test_every_step_has_the_training_forwards_logprobs(tokenizer: Any, tmp_path: Path, family: str, how: str) -> None:
    for record in records(tokenizer, tmp_path, family, how):
        assert record.mismatch.num_tokens == record.num_generated_tokens > 60
        assert record.mismatch.max_abs <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in HYBRIDS if not TABLE[name].is_latent])  # MLA rounds elsewhere
def test_under_autocast_they_are_those_of_a_training_forward_whose_rule_is_not_cast(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As `flash-linear-attention` has it. Float32 rollouts would be 8e-3 off on average."""
    keep_rules_in_float32(monkeypatch, family)
    for record in records(tokenizer, tmp_path, family, "rollout_func", bf16=True):
        assert record.mismatch.mean_abs < 3e-3


def keep_rules_in_float32(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    file = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(FAMILIES[family])].__module__]
    for name in [name for name in vars(file) if re.fullmatch(r"(torch_)?chunk_\w+_delta_\w+", name)]:
        monkeypatch.setattr(file, name, torch.autocast("cpu", enabled=False)(getattr(file, name)))


def test_states_that_are_not_kept_show_as_mismatch(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: every token is drawn as if nothing had come before it in layers of linear attention."""
    states = StateStore.states
    monkeypatch.setattr(StateStore, "states", lambda self, *args: states(self, *args) * 0)
    [record, *_] = records(tokenizer, tmp_path, "qwen3_5_text", "rollout_func")
    assert record.mismatch.max_abs > 1e-2
