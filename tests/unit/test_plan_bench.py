"""The arithmetic of the benchmark that holds the model of cost to the clock, and (slow) that it runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import plan
from cpinfer.layout.cost_model import Link, Rates, StepSeconds
from cpinfer.layout.grid import RankGrid

BENCH = Path(__file__).parents[2] / "tools" / "bench"
RATES = Rates(((1, 1e9), (64, 1e11)), 1e11, 1e10, Link(1e9, 1e-4), decode_flops=1e10, step_s=1e-3, layer_s=1e-4)


def compared(predicted: float, measured: float, pcp: int = 1, step: str = "prefill") -> plan.Compared:
    return plan.Compared(RankGrid(pcp_size=pcp, dp_size=4 // pcp), step, StepSeconds(products=predicted), measured)


def test_errors_are_shares_of_what_was_measured():
    assert compared(1.2, 1.0).error == pytest.approx(0.2)
    assert compared(0.5, 1.0).error == -0.5
    assert plan.median_error([compared(1.2, 1.0), compared(0.5, 1.0), compared(1.0, 1.0)]) == pytest.approx(0.2)


def test_only_layouts_of_the_same_work_and_replicas_have_an_order_and_near_ties_have_none():
    def one(dcp: int, predicted: float, measured: float) -> plan.Compared:
        grid = RankGrid(pcp_size=4, dcp_size=dcp)
        return plan.Compared(grid, "decode", StepSeconds(products=predicted), measured)

    assert plan.pairs_in_order([one(1, 1, 1), one(2, 2, 3)]) == 1.0
    assert plan.pairs_in_order([one(1, 1, 1), one(2, 2, 3), one(4, 3, 2)]) == pytest.approx(2 / 3)
    assert plan.pairs_in_order([one(1, 1, 1), one(2, 2, 0.97)]) == 1.0, "within 5 % there is none"
    assert plan.pairs_in_order([one(1, 1, 3), compared(2, 1)]) == 1.0, "other replicas do other work"


def test_more_than_twelve_layouts_of_up_to_four_ranks_are_compared():
    grids = [grid for n in plan.WORLDS for grid in plan.grids(n, plan.FULL.shape)]
    assert len(grids) == len(set(grids)) == 20
    for grid in grids:
        steps = plan.predictions(plan.FULL, grid, RATES)
        assert list(steps) == plan.steps_of(plan.FULL)
        assert all(step.seconds > 0 for step in steps.values())


def test_rates_come_back_from_json():
    assert plan.rates_of(json.loads(json.dumps(dataclasses.asdict(RATES)))) == RATES


@pytest.mark.slow
def test_the_benchmark_runs_and_leaves_its_card(tmp_path):
    command = [sys.executable, str(BENCH / "plan.py"), "--quick", "--ranks", "1", "2", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ok"] and told["num_layouts"] == 6 and told["num_steps"] == 18
    assert "the median error is" in Path(told["card"]).read_text()
