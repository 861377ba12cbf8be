"""A rank that stops or is stuck within a trainer's phase: the others raise, name it, and have their model back."""

from __future__ import annotations

import pytest

from launching import forked

# Of which most is the fork server's imports.
pytestmark = pytest.mark.timeout(200)

WORKER = "tests/integrations/hung_worker.py"
FAILED = 3
# Half an hour is what the trainer's own groups would wait.
WITHIN_S = 30.0


def check(kind: str, fault: str, faulty: int) -> None:
    finished = forked(2, WORKER, kind, fault, str(faulty), timeout_s=180)
    told = finished.summary
    assert finished.returncode != 0 and told["rank"] == 1 - faulty, finished
    assert told["missing"] == [faulty] and "step 4 (decode) did not end" in told["error"], finished
    assert told["changed"] == [] and told["phase_s"] < WITHIN_S, finished


def test_a_phase_in_which_a_rank_stops_raises_and_gives_layers_on_their_way_back() -> None:
    check("zero3:layerwise", "stop", 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault, faulty", [("stop", 0), ("sleep", 1)])
@pytest.mark.parametrize("kind", ["zero2", "zero3:full", "zero3:tp_shards", "ddp", "fsdp2:full", "fsdp2:layerwise"])
def test_a_phase_raises_and_gives_everything_back(kind: str, fault: str, faulty: int) -> None:
    check(kind, fault, faulty)


@pytest.mark.slow
def test_a_phase_in_which_all_ranks_come_raises_nothing() -> None:
    finished = forked(2, WORKER, "zero2", "none", "0", timeout_s=180)
    assert finished.returncode == 0 and finished.summary["missing"] == [] and finished.summary["changed"] == [], (
        finished
    )
