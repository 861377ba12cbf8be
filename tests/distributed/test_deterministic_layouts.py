"""The deterministic mode over real processes: one rank, two and four give the same floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import forked

DTYPES = ("float32", "bfloat16")
# Of each tensor-parallel size a layout by which the others are judged, and on how many processes each of them runs.
LAYOUTS: dict[int, dict[int, list[dict[str, Any]]]] = {
    1: {
        1: [{"pcp": 1, "dcp": 1}],
        2: [{"pcp": 2, "dcp": 2, "max_num_batched_tokens": 50}, {"pcp": 2, "dcp": 1}],
        4: [{"pcp": 4, "dcp": 4, "max_num_batched_tokens": 50}, {"pcp": 4, "dcp": 2}],
    },
    2: {
        2: [{"tp": 2, "pcp": 1, "dcp": 1}, {"tp": 2, "pcp": 1, "dcp": 2, "max_num_batched_tokens": 50}],
        4: [{"tp": 2, "pcp": 2, "dcp": 2}, {"tp": 2, "pcp": 2, "dcp": 4, "max_num_batched_tokens": 50}],
    },
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("tp", "most_ranks"),
    [(1, 2), (2, 2), pytest.param(1, 4, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)],
)
def test_real_processes_give_the_same_bits(tp: int, most_ranks: int, tmp_path: Path) -> None:
    families = ("qwen2",) if most_ranks == 2 else ("qwen2", "gemma2", "gpt_oss", "deepseek_v2")
    found: dict[tuple[str, str], list[Any]] = {}
    for num_ranks, layouts in LAYOUTS[tp].items():
        if num_ranks > most_ranks:
            continue
        output = tmp_path / f"{num_ranks}.jsonl"
        wanted = [{**layout, "family": f, "dtype": d} for f in families for d in DTYPES for layout in layouts]
        worker = "tests/distributed/deterministic_worker.py"
        finished = forked(num_ranks, worker, str(output), json.dumps(wanted), timeout_s=350)
        assert finished.returncode == 0, finished
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(lines) == len(wanted)
        for line in lines:
            found.setdefault((line["layout"]["family"], line["layout"]["dtype"]), []).append(line)
    assert len(found) == len(families) * len(DTYPES)
    for (family, dtype), lines in found.items():
        assert len(lines) > 1
        for line in lines[1:]:
            assert line["found"] == lines[0]["found"], (family, dtype, line["layout"])
