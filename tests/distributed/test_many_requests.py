"""Through a pool that holds few requests at a time, every one comes out once, and no block is left behind."""

from __future__ import annotations

import pytest

from launching import forked


@pytest.mark.parametrize("num_requests", [200, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_block_leaks_and_every_sample_is_present_once(num_requests: int) -> None:
    worker = "tests/distributed/many_requests_worker.py"
    finished = forked(2, worker, str(num_requests), timeout_s=100 if num_requests < 1000 else 800)
    assert finished.returncode == 0, finished
    outcome = finished.summary
    assert outcome["num_samples"] == num_requests
    assert outcome["each_once"] and outcome["lengths_right"], outcome
    assert outcome["num_preemptions"] > 0 and outcome["num_cached_prefill_tokens"] > 0, outcome
