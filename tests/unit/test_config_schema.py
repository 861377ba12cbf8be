"""The JSON Schema of configs says of a config what reading it says: as far as a value alone can be judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import docs
from config_schema import config_schema
from cpinfer.errors import UserError
from cpinfer_tools.run_config import parse_run_config

CONFIGS = Path(__file__).parents[2] / "configs"
VALIDATOR = jsonschema.Draft202012Validator(config_schema())


def test_it_is_a_schema_and_the_shipped_one() -> None:
    jsonschema.Draft202012Validator.check_schema(config_schema())
    assert json.loads(docs.SCHEMA.read_text()) == config_schema()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_name_it_and_hold_to_it(path: Path) -> None:
    config = json.loads(path.read_text())
    assert path.parent / config["$schema"] == docs.SCHEMA
    VALIDATOR.validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"$schema": "https://example.org"},
        {"tensor_parallel": {"tp_size": None, "provider": "transformers"}},
        {"sampling": {"temperature": 0, "stop": "one", "stop_token_ids": [1, 2]}},
        {"sampling": {"logit_bias": {"7": 1.5}, "top_p": 1}},
        {"sampling": {"logit_bias": [[7, 1.5]], "stop": []}},
        {"training": {"zero_stage": None}},
        {"evaluation": {"depths": [0, 0.5], "lengths": [8]}},
        {"wandb": {"project": "p"}},
        {"decode_context_parallel_size": "auto"},
        {"decode_context_parallel_size": 2},
    ],
)
def test_what_it_takes_is_read(config: dict[str, Any]) -> None:
    VALIDATOR.validate(config)
    parse_run_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"bolck_size": 8},
        {"block_size": "8"},
        {"block_size": 0},
        {"block_size": True},
        {"decode_context_parallel_size": "automatic"},
        {"tensor_parallel": {"tp_size": 0}},
        {"tensor_parallel": {"provider": "megatron"}},
        {"sampling": {"temperature": 1e-9}},
        {"sampling": {"top_p": 0}},
        {"sampling": {"stop": 3}},
        {"sampling": {"logit_bias": {"-7": 1.5}}},
        {"sampling": {"logit_bias": {"seven": 1.5}}},
        {"sampling": {"logit_bias": [[7]]}},
        {"sampling": {"logit_bias": [[7, 1e30]]}},
        {"training": {"zero_stage": 4}},
        {"evaluation": {"depths": [2]}},
        {"wandb": {"project": 1}},
        {"model": "x" * 5000},
        [],
    ],
)
def test_what_it_refuses_is_refused(config: Any) -> None:
    assert not VALIDATOR.is_valid(config)
    with pytest.raises(UserError):
        parse_run_config(config)
