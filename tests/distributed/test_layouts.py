"""The same parity as on threads, over real processes and gloo; DeepSpeed's AutoTP is the tensor parallelism."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from launching import launch, torchrun
from tiny_models import FAMILIES, make_model, prompts_of

# kv: KV heads of the model; with fewer than tp they are expanded, and dcp above pcp then shards the copies.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"tp": 2, "pcp": 1, "dcp": 1, "kv": 2},
        {"tp": 2, "pcp": 1, "dcp": 2, "kv": 1},
        {"tp": 1, "pcp": 2, "dcp": 2, "kv": 2},
        {"tp": 1, "pcp": 2, "dcp": 2, "kv": 2, "family": "qwen3"},
        {"tp": 2, "pcp": 1, "dcp": 1, "kv": 2, "family": "mistral"},
        {"tp": 1, "pcp": 1, "dcp": 1, "kv": 2},
        {"tp": 1, "pcp": 2, "dcp": 1, "kv": 2, "max_num_batched_tokens": 50},
        {"tp": 2, "pcp": 1, "dcp": 2, "kv": 1, "max_num_batched_tokens": 50, "context_exchange": "kv"},
        {"tp": 1, "pcp": 2, "dcp": 2, "kv": 2, "decode_exchange": "ag_rs", "max_num_batched_tokens": 70},
    ],
    4: [
        {"tp": 2, "pcp": 2, "dcp": 2, "kv": 2},
        {"tp": 2, "pcp": 2, "dcp": 4, "kv": 1},
        {"tp": 4, "pcp": 1, "dcp": 2, "kv": 2},
        {"tp": 1, "pcp": 4, "dcp": 4, "kv": 2, "family": "llama"},
        {"tp": 4, "pcp": 1, "dcp": 4, "kv": 1, "family": "qwen3"},
        {"tp": 1, "pcp": 4, "dcp": 2, "kv": 2},
        {"tp": 2, "pcp": 2, "dcp": 4, "kv": 1, "max_num_batched_tokens": 50, "decode_exchange": "ag_rs"},
        {"tp": 2, "pcp": 2, "dcp": 2, "kv": 2, "max_num_batched_tokens": 50, "decode_exchange": "replicate_q"},
    ],
}


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_real_processes_give_the_tokens_and_logprobs_of_transformers(num_ranks: int, tmp_path: Path) -> None:
    output = tmp_path / "outcomes.jsonl"
    worker = "tests/distributed/layout_worker.py"
    finished = launch(torchrun(num_ranks, worker, str(output), json.dumps(LAYOUTS[num_ranks])), timeout_s=110)
    assert finished.returncode == 0, finished
    outcomes = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(outcomes) == len(LAYOUTS[num_ranks])
    for outcome in outcomes:
        assert outcome["num_same_tokens"] == outcome["num_prompts"] == 6, outcome
        assert outcome["max_abs_logprob_difference"] <= 1e-4, outcome
        assert outcome["sampled"] == sampled_alone(outcome.get("family", "qwen2"), outcome["kv"]), outcome


def sampled_alone(family: str, num_kv_heads: int) -> list[list[int]]:
    """What one process samples with the same seed."""
    config = copy.deepcopy(FAMILIES[family])
    config.num_key_value_heads = num_kv_heads
    with cpinfer.attach(make_model(config), config=parse_config({"dtype": "float32"})) as engine:
        results = engine.generate(
            prompts_of((1, 2, 3, 17, 64, 200), vocab_size=128), SamplingParams(temperature=1, seed=4, max_new_tokens=10)
        )
    return [list(r.token_ids) for r in results]
