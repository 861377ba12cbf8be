"""The same parity as on threads, over real processes and gloo; DeepSpeed's AutoTP is the tensor parallelism."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from every_family import WITHOUT_TP
from launching import forked
from tiny_models import FAMILIES, make_model, prompts_of

# kv: KV heads of the model where not its own 2; with fewer than tp they are expanded, and dcp above pcp then shards the
# copies. With as many, dcp above pcp makes groups that mix heads.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"tp": 2, "pcp": 1, "dcp": 1, "kv": 2},
        {"tp": 2, "pcp": 1, "dcp": 2, "kv": 1},
        {"tp": 1, "pcp": 2, "dcp": 2, "kv": 2},
        {"tp": 1, "pcp": 2, "dcp": 2, "kv": 2, "family": "qwen3"},
        {"tp": 2, "pcp": 1, "dcp": 1, "kv": 2, "family": "mistral"},
        {"tp": 1, "pcp": 1, "dcp": 1, "kv": 2},
        {"tp": 1, "pcp": 2, "dcp": 2, "family": "qwen3_next", "max_num_batched_tokens": 70},
        {"tp": 1, "pcp": 2, "dcp": 1, "family": "qwen3_5_text"},
        {"tp": 2, "pcp": 1, "dcp": 2, "family": "qwen3_next", "max_num_batched_tokens": 70, "state_cache_gib": 2**-8},
        {"tp": 1, "pcp": 2, "dcp": 1, "kv": 2, "max_num_batched_tokens": 50},
        {"tp": 2, "pcp": 1, "dcp": 2, "kv": 1, "max_num_batched_tokens": 50, "context_exchange": "kv"},
        {"tp": 1, "pcp": 2, "dcp": 2, "kv": 2, "decode_exchange": "ag_rs", "max_num_batched_tokens": 70},
        {"tp": 2, "pcp": 1, "dcp": 2},
        {"tp": 2, "pcp": 1, "dcp": 2, "family": "deepseek_v3"},
        {"tp": 2, "pcp": 1, "dcp": 2, "family": "gpt_oss", "max_num_batched_tokens": 50},
        {"tp": 2, "pcp": 1, "dcp": 2, "family": "gpt_bigcode"},
        {"tp": 1, "pcp": 2, "dcp": 1, "family": "qwen3_moe", "max_num_batched_tokens": 250},
    ],
    4: [
        {"tp": 2, "pcp": 2, "dcp": 2, "kv": 2},
        {"tp": 2, "pcp": 2, "dcp": 4, "kv": 1},
        {"tp": 4, "pcp": 1, "dcp": 2, "kv": 2},
        {"tp": 1, "pcp": 4, "dcp": 4, "kv": 2, "family": "llama"},
        {"tp": 4, "pcp": 1, "dcp": 4, "kv": 1, "family": "qwen3"},
        {"tp": 1, "pcp": 4, "dcp": 2, "kv": 2},
        {"tp": 1, "pcp": 4, "dcp": 2, "family": "qwen3_next"},
        {"tp": 2, "pcp": 2, "dcp": 4, "family": "qwen3_5_text"},
        {"tp": 4, "pcp": 1, "dcp": 2, "family": "qwen3_5_moe_text"},
        {"tp": 1, "pcp": 4, "dcp": 4, "family": "qwen3_5_moe_text", "max_num_batched_tokens": 90},
        {"tp": 2, "pcp": 2, "dcp": 4, "kv": 1, "max_num_batched_tokens": 50, "decode_exchange": "ag_rs"},
        {"tp": 2, "pcp": 2, "dcp": 2, "kv": 2, "max_num_batched_tokens": 50, "decode_exchange": "replicate_q"},
    ],
}
# Every family, sharded by AutoTP: its own KV heads, mixed in a group, then copies of one.
CHUNKED = {"max_num_batched_tokens": 50}
WITH_EXPERTS = [f for f, config in FAMILIES.items() if getattr(config, "num_experts_per_tok", None)]
WITH_TP = [family for family in FAMILIES if family not in WITHOUT_TP]
ONE_HEAD_OF_KV = ("deepseek_v2", "deepseek_v3", "gpt_bigcode")
EVERY_FAMILY: dict[int, list[dict[str, Any]]] = {
    2: [
        *({"tp": 2, "pcp": 1, "dcp": 2, "family": family, **CHUNKED} for family in WITH_TP),
        *(
            {"tp": 2, "pcp": 1, "dcp": 2, "kv": 1, "family": family}
            for family in WITH_TP
            if family not in ONE_HEAD_OF_KV
        ),
    ],
    4: [
        *({"tp": 2, "pcp": 2, "dcp": 4, "family": family, **CHUNKED} for family in WITH_TP),
        *({"tp": 4, "pcp": 1, "dcp": 2, "family": family} for family in WITH_TP),
    ],
}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_real_processes_give_the_tokens_and_logprobs_of_transformers(num_ranks: int, tmp_path: Path) -> None:
    check(num_ranks, LAYOUTS[num_ranks], tmp_path, timeout_s=110)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", EVERY_FAMILY)
def test_every_family_over_real_processes_equals_transformers(num_ranks: int, tmp_path: Path) -> None:
    check(num_ranks, EVERY_FAMILY[num_ranks], tmp_path, timeout_s=500)


def check(num_ranks: int, layouts: list[dict[str, Any]], folder: Path, timeout_s: float) -> None:
    output = folder / "outcomes.jsonl"
    worker = "tests/distributed/layout_worker.py"
    finished = forked(num_ranks, worker, str(output), json.dumps(layouts), timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    outcomes = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(outcomes) == len(layouts)
    for outcome in outcomes:
        assert outcome["num_same_tokens"] == outcome["num_prompts"] == 6, outcome
        assert outcome["num_same_turns"] == outcome["num_turns"] == 12, outcome
        assert outcome["max_abs_logprob_difference"] <= 1e-4, outcome
        assert outcome["num_other_experts"] == (0 if outcome.get("family") in WITH_EXPERTS else None), outcome
        assert outcome["sampled"] == sampled_alone(outcome.get("family", "qwen2"), outcome.get("kv")), outcome


@functools.cache
def sampled_alone(family: str, num_kv_heads: int | None) -> list[list[int]]:
    """What one process samples with the same seed."""
    config = copy.deepcopy(FAMILIES[family])
    if num_kv_heads is not None:
        config.num_key_value_heads = num_kv_heads
    alone = parse_config({"dtype": "float32", "kv_cache_gib": 2**-8})
    prompts = prompts_of((1, 2, 3, 17, 64, 200), vocab_size=128)
    named = [{"prompt_token_ids": prompt, "id": i} for i, prompt in enumerate(prompts)]
    with cpinfer.attach(make_model(config), config=alone) as engine:
        results = engine.generate(named, SamplingParams(temperature=1, seed=4, max_new_tokens=10))
    return [list(r.token_ids) for r in results]
