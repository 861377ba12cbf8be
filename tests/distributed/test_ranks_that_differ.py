"""Ranks that do not make the same call, as real processes over gloo: a named error on each, and the group lives on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launching import forked

TOLD = {
    "block_size": "rank 1 has block_size 32, rank 0 has 16",
    "decode_exchange": "rank 1 has decode_exchange 'ag_rs', rank 0 has 'a2a'",
    "wire dtype": "rank 1 has cp_wire_dtype 'bfloat16', rank 0 has 'auto'",
    "weights": "rank 1 has weight model.layers.0.mlp.down_proj.weight.values",
    "prompts": "rank 1 has prompts[0].token_ids",
    "one prompt fewer": "rank 1 has prompts.count 2, rank 0 has 3",
    "seed": "rank 1 has sampling.seed 1, rank 0 has 0",
    "n": "rank 1 has sampling.n 2, rank 0 has 1",
    "grid": "rank 1 has dcp_size 2, rank 0 has 1",
    "score": "rank 1 has call 'score', rank 0 has 'generate'",
}


def test_ranks_that_differ_end_in_one_named_error_and_may_go_on_together(tmp_path: Path) -> None:
    output = tmp_path / "outcomes"
    finished = forked(2, "tests/distributed/same_call_worker.py", str(output), timeout_s=100)
    assert finished.returncode == 0, finished
    zero, one = (json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(2))
    for scenario, told in TOLD.items():
        for line in (zero[scenario], one[scenario]):
            assert line.get("error") == "RanksDifferError", line
            assert told in line["message"]
    assert _error(zero, "leave early") == _error(one, "leave early") == "StreamEndedError"
    assert (_error(zero, "raise early"), _error(one, "raise early")) == ("StreamEndedError", "KeyError")
    results = [outcome[name]["result"] for outcome in (zero, one) for name in ("the same", "the same again")]
    assert all(result == results[0] for result in results), "errors must leave nothing behind"


def _error(outcome: dict[str, Any], scenario: str) -> Any:
    return outcome[scenario].get("error")
