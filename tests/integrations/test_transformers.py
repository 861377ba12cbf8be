"""Transformers' own tensor parallelism under the engine, and AutoTP: the answers of the unsharded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpinfer.config import parse_config
from cpinfer.engine.attach import config_errors
from cpinfer.models.families import FAMILIES as SUPPORTED
from cpinfer.models.spec import ModelSpec
from cpinfer_integrations.transformers import topology_from
from every_family import WITHOUT_TP
from launching import forked
from tiny_models import FAMILIES

SHARDED = [name for name, family in SUPPORTED.items() if "transformers_tp" not in family.refused]


def check(
    folder: Path, num_ranks: int, cases: list[dict[str, Any]], timeout_s: float, provider: str = "transformers"
) -> None:
    worker = "tests/integrations/sharded_worker.py"
    cases = [{"provider": provider, **case} for case in cases]
    finished = forked(num_ranks, worker, str(folder), json.dumps(cases), timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    outcomes = finished.summary["outcomes"]
    assert [outcome["family"] for outcome in outcomes] == [case["family"] for case in cases]
    for outcome in outcomes:
        assert all(outcome["same_tokens"]), outcome
        assert outcome["max_abs_logprob_difference"] <= 1e-4, outcome
        assert outcome["num_other_experts"] == 0, outcome


def test_a_model_that_transformers_sharded_gives_the_answers_of_the_whole_one(tmp_path: Path) -> None:
    cases = [
        {"family": "qwen2", "tp": 2, "pcp": 1, "dcp": 2},
        {"family": "gemma2", "tp": 2, "pcp": 1, "dcp": 1},
        {"family": "mixtral", "tp": 2, "pcp": 1, "dcp": 2, "max_num_batched_tokens": 50},
        {"family": "deepseek_v2", "tp": 2, "pcp": 1, "dcp": 2},
        {"family": "qwen3_5_text", "tp": 2, "pcp": 1, "dcp": 2},
    ]
    check(tmp_path, 2, cases, timeout_s=100)


@pytest.mark.slow
def test_every_family_that_transformers_shards_gives_the_answers_of_the_whole_one(tmp_path: Path) -> None:
    cases = [{"family": family, "tp": 2, "pcp": 1, "dcp": 2, "max_num_batched_tokens": 50} for family in SHARDED]
    check(tmp_path, 2, cases, timeout_s=300)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_family_that_autotp_shards_gives_the_answers_of_the_whole_one(tmp_path: Path) -> None:
    families = [family for family in FAMILIES if family not in WITHOUT_TP]
    cases = [{"family": family, "tp": 2, "pcp": 1, "dcp": 2, "max_num_batched_tokens": 50} for family in families]
    check(tmp_path, 2, cases, timeout_s=550, provider="autotp")


@pytest.mark.slow
def test_its_replicas_are_lent_to_prefill(tmp_path: Path) -> None:
    cases = [
        {"family": "llama", "tp": 2, "pcp": 2, "dcp": 4},
        {"family": "deepseek_v2", "tp": 2, "pcp": 2, "dcp": 2, "max_num_batched_tokens": 50},
    ]
    check(tmp_path, 4, cases, timeout_s=110)


@pytest.mark.parametrize("family", SUPPORTED)
def test_families_it_does_not_shard_are_refused_by_name_before_loading(family: str) -> None:
    config = parse_config({"tensor_parallel": {"tp_size": 2, "provider": "transformers"}})
    errors = config_errors(ModelSpec.from_config(FAMILIES[family].to_dict()), config)
    assert bool(errors) == (family not in SHARDED)
    words = "tp_size 1" if "autotp" in SUPPORTED[family].refused else '"autotp"'
    assert all(f'"{family}"' in error and words in error for error in errors)


def test_more_ranks_than_kv_heads_are_refused() -> None:
    config = parse_config({"tensor_parallel": {"tp_size": 4, "provider": "transformers"}})
    [error] = config_errors(ModelSpec.from_config(FAMILIES["llama"].to_dict()), config)
    assert "tp=4 over 2 KV heads" in error and "autotp" in error
    assert config_errors(ModelSpec.from_config(FAMILIES["deepseek_v2"].to_dict()), config) == []


def test_a_model_that_nobody_sharded_has_no_such_topology() -> None:
    with pytest.raises(ValueError, match="no weight of this model lies on a device mesh with a tp axis"):
        topology_from(torch.nn.Linear(2, 2))
