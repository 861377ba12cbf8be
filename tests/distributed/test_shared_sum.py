"""Sums in shared memory, on real processes: every rank has the same bits, and none waits for one that has gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import forked

WORKER = "tests/distributed/shared_sum_worker.py"


def run(num_ranks: int, folder: Path, *cases: str, timeout_s: float = 100) -> list[dict[str, Any]]:
    """What came of each case, by rank."""
    finished = forked(num_ranks, WORKER, str(folder / "outcome"), *cases, timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    told = [(folder / f"outcome.{rank}").read_text().splitlines() for rank in range(num_ranks)]
    return [{name: value for line in lines for name, value in json.loads(line).items()} for lines in told]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = ("sums", "many", "stand_in", "differ", "refused", "late", "leaves", "engine")
    return run(2, tmp_path_factory.mktemp("two"), *cases)


def test_two_ranks_have_the_sum_in_the_order_of_ranks_and_the_bits_of_gloo(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        assert set(outcome["sums"]) == {"float32", "bfloat16", "float16"}
        for dtype, told in outcome["sums"].items():
            assert told["wrong"] == [], dtype
            assert told["as_gloo"], dtype
        assert outcome["many"] == {"num_wrong": 0}


@pytest.mark.slow
def test_four_ranks_have_the_sum_in_the_order_of_ranks_and_another_order_would_show(tmp_path: Path) -> None:
    for outcome in run(4, tmp_path, "sums", "many"):
        assert all(told["wrong"] == [] for told in outcome["sums"].values())
        assert outcome["sums"]["float32"]["reversed_differs"], "these numbers must tell orders apart"
        assert outcome["many"] == {"num_wrong": 0}


def test_what_stands_in_for_a_group_sums_here_and_hands_on_all_else(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        told = outcome["stand_in"]
        assert told["summed_here"] == [5], "float64, other operations and calls that do not wait are the group's"
        assert told["values"] == [3, 2, 3, 3]
        assert told["gathered"] == [0, 1]
        assert told["rank"] and told["size"]


def test_ranks_that_sum_other_sizes_or_dtypes_are_named_on_all(two: list[dict[str, Any]]) -> None:
    for rank, outcome in enumerate(two):
        numbers = [("4 numbers of float32", "5 of float32"), ("5 numbers of float32", "4 of float32")]
        dtypes = [("4 numbers of float32", "4 of bfloat16"), ("4 numbers of bfloat16", "4 of float32")]
        for case, (own, other) in (("size", numbers[rank]), ("dtype", dtypes[rank])):
            told = outcome["differ"][case]
            assert told["error"] == "RanksDifferError"
            assert f"rank {rank} sums {own}, rank {1 - rank} {other}" in told["message"]
            assert outcome["differ"][f"{case}, again"]["error"] == "PeerLostError", "and nothing is summed behind it"


def test_where_one_rank_cannot_none_does_and_all_know_why(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        told = outcome["refused"]
        assert told["no compiler"].startswith("no C++ compiler was found")
        assert told["no compiler"].endswith("(rank 1)")
        assert told["another host"] == "ranks 0 and 1 are on different hosts, or in different containers"
        assert "is another file here (rank 1)" in told["another file"]
        assert told["no locks"] == "no locks here (rank 1)"
        assert told["unwanted"] == "not wanted (rank 1)"
        assert told["left_open"] == 0
    assert two[0]["refused"] == two[1]["refused"]


def test_who_waits_longer_than_the_group_would_ends_as_if_by_it(two: list[dict[str, Any]]) -> None:
    late = two[0]["late"]
    assert late["timeout"] and "timed out waiting 0.3 s for rank 1" in late["message"]
    assert 0.3 <= late["took_s"] < 10


def test_a_rank_that_leaves_ends_the_wait_for_it_and_not_the_sum_before(two: list[dict[str, Any]]) -> None:
    leaves = two[0]["leaves"]
    assert leaves["lost"] and leaves["message"].startswith("rank 1 has ended, or left its engine")
    assert leaves["took_s"] < 10


def test_a_killed_rank_ends_the_wait_for_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (outcome,) = run_killed(tmp_path)
    assert outcome["killed"]["lost"] and "rank 1 has ended" in outcome["killed"]["message"]
    assert outcome["killed"]["took_s"] < 10
    assert outcome["killed"]["left_open"] == 0


def run_killed(folder: Path) -> list[dict[str, Any]]:
    finished = forked(2, WORKER, str(folder / "outcome"), "killed", timeout_s=60)
    assert finished.returncodes[0] == 0 and finished.returncodes[1] != 0, finished
    return [json.loads((folder / "outcome.0").read_text())]


def test_an_engine_sums_here_while_it_is_attached_with_the_answers_of_the_group(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        auto, group = outcome["engine"]["auto"], outcome["engine"]["group"]
        assert auto["stand_ins"] == outcome["engine"]["num_layers"] > 0
        assert auto["num_sums"] > 0
        assert (group["stand_ins"], group["num_sums"]) == (0, 0)
        assert (auto["tokens"], auto["logprobs"]) == (group["tokens"], group["logprobs"])
        assert auto["restored"] and group["restored"]
        assert outcome["engine"]["left_open"] == 0
