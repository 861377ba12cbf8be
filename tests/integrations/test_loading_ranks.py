"""Ranks that read what they keep of the weights have what a provider cuts for them of a whole model, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpinfer.models.families import FAMILIES as SUPPORTED
from every_family import WITHOUT_TP
from launching import forked
from tiny_models import FAMILIES

SHARDED = [name for name, family in SUPPORTED.items() if "transformers_tp" not in family.refused]
ONE_KV_HEAD = {"num_key_value_heads": 1}  # of which two ranks have a copy each


def load(folder: Path, num_ranks: int, cases: list[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
    """What every case came to; none of its ranks has another weight or buffer than it should."""
    worker = "tests/integrations/loading_worker.py"
    finished = forked(num_ranks, worker, str(folder), json.dumps(cases), timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    outcomes: list[dict[str, Any]] = finished.summary["outcomes"]
    for case, outcome in zip(cases, outcomes, strict=True):
        for rank, told in enumerate(outcome["ranks"]):
            assert (told["other_weights"], told["other_buffers"]) == ([], []), (case, rank)
            read, expected = told["read"]
            assert read == expected < outcome["file_bytes"], (case, rank)
    return outcomes


def test_ranks_read_their_parts_and_no_more_whoever_shards_and_whatever_the_dtype(tmp_path: Path) -> None:
    cases = [
        {"family": "llama", "provider": "autotp"},
        {"family": "qwen2", "provider": "autotp", "dtype": "bfloat16", **ONE_KV_HEAD},
        {"family": "deepseek_v3", "provider": "autotp", "dtype": "bfloat16"},  # keeps weights of a router in float32
        {"family": "gpt_bigcode", "provider": "autotp"},  # whose queries, keys and values AutoTP cuts in its own way
        {"family": "gemma2", "provider": "autotp", "tie_word_embeddings": True},
        {"family": "llama", "provider": "transformers"},
        {"family": "mixtral", "provider": "transformers", "dtype": "bfloat16"},
    ]
    by_family = [{**case, **outcome} for case, outcome in zip(cases, load(tmp_path, 2, cases, 100), strict=True)]
    assert by_family[0]["num_files"] > 1, "its weights are in several files"
    # What would show a rank that reads the first one's part: there are such weights, and no others.
    sliced = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    first, second = (told["digests"] for told in by_family[0]["ranks"])
    assert {name.rsplit(".", 2)[-2] for name in first if first[name] != second[name]} == sliced


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_read_their_parts_of_every_family_that_autotp_shards(tmp_path: Path, dtype: str) -> None:
    families = [family for family in FAMILIES if family not in WITHOUT_TP]
    load(tmp_path, 2, [{"family": family, "provider": "autotp", "dtype": dtype} for family in families], 550)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_read_their_parts_of_every_family_that_transformers_shards(tmp_path: Path, dtype: str) -> None:
    load(tmp_path, 2, [{"family": family, "provider": "transformers", "dtype": dtype} for family in SHARDED], 550)


@pytest.mark.slow
def test_four_ranks_read_two_kv_heads(tmp_path: Path) -> None:
    families = [family for family in FAMILIES if family not in WITHOUT_TP]
    load(tmp_path, 4, [{"family": family, "provider": "autotp"} for family in families], 280)
