"""Collectives in shared memory, on real processes: bits of the group's, and nobody waits for a rank that has gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import forked

WORKER = "tests/distributed/shared_memory_worker.py"


def run(num_ranks: int, folder: Path, *cases: str, timeout_s: float = 100) -> list[dict[str, Any]]:
    """What came of each case, by rank."""
    finished = forked(num_ranks, WORKER, str(folder / "outcome"), *cases, timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    told = [(folder / f"outcome.{rank}").read_text().splitlines() for rank in range(num_ranks)]
    return [{name: value for line in lines for name, value in json.loads(line).items()} for lines in told]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = (
        "sums",
        "many",
        "axis",
        "stand_in",
        "differ",
        "refused",
        "late",
        "leaves",
        "interrupted",
        "interrupted_between_looks",
        "left_by_another_thread",
        "left_by_a_fork",
        "engine",
        "layout",
    )
    return run(2, tmp_path_factory.mktemp("two"), *cases)


def test_two_ranks_have_the_sum_in_the_order_of_ranks_and_the_bits_of_gloo(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        assert set(outcome["sums"]) == {"float32", "bfloat16", "float16"}
        for dtype, told in outcome["sums"].items():
            assert told["wrong"] == [], dtype
            assert told["as_gloo"], dtype
        assert outcome["many"] == {"num_wrong": 0}


def test_all_collectives_of_an_axis_have_the_bits_of_its_group(two: list[dict[str, Any]]) -> None:
    for rank, outcome in enumerate(two):
        check_axis(outcome["axis"], rank, 2)


def check_axis(told: dict[str, Any], rank: int, size: int) -> None:
    assert told["wrong"] == []
    # Six shapes, twice each by their strides; gathers twice, of six dtypes, and sums of the three that are summed here.
    assert told["calls"] == {"0": 144, "1": 72, "2": 36, "3": 36}
    assert told["places"] == [size, rank]


@pytest.mark.slow
def test_four_ranks_have_the_sum_in_the_order_of_ranks_and_another_order_would_show(tmp_path: Path) -> None:
    for rank, outcome in enumerate(run(4, tmp_path, "sums", "many", "axis")):
        check_axis(outcome["axis"], rank, 4)
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


def test_ranks_that_make_other_calls_are_named_on_all(two: list[dict[str, Any]]) -> None:
    of = {
        "size": ("sums 4 numbers of float32", "sums 5 numbers of float32"),
        "dtype": ("sums 4 numbers of float32", "sums 4 numbers of bfloat16"),
        "kind": ("gathers 16 bytes", "sends each 8 bytes"),
        "bytes": ("gathers 16 bytes", "gathers 20 bytes"),
    }
    for rank, outcome in enumerate(two):
        assert outcome["differ"].keys() == {*of, *(f"{case}, again" for case in of)}
        for case, what in of.items():
            told = outcome["differ"][case]
            assert told["error"] == "RanksDifferError"
            assert f"rank {rank} {what[rank]}, rank {1 - rank} {what[1 - rank]};" in told["message"]
            assert outcome["differ"][f"{case}, again"]["error"] == "PeerLostError", "and nothing is exchanged behind it"


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


def test_a_first_interrupt_waits_for_the_others_and_a_second_does_not(two: list[dict[str, Any]]) -> None:
    first, second = (two[0]["interrupted"][num] for num in "12")
    assert first["error"] == "KeyboardInterrupt" and first["x"] == [3, 3, 3], "rank 1 has the same, and goes on"
    assert first["took_s"] > 0.7
    assert second["error"] == "KeyboardInterrupt" and second["x"] == [1, 1, 1]
    assert second["took_s"] < 0.7
    assert two[1]["interrupted"]["1"]["error"] is None and two[1]["interrupted"]["1"]["x"] == [3, 3, 3]


def test_an_interrupt_between_two_looks_leaves_no_half_of_a_sum_for_the_next(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        assert outcome["interrupted_between_looks"]["next"]["error"] == "PeerLostError"
    assert two[0]["interrupted_between_looks"]["first"]["error"] == "KeyboardInterrupt"
    assert "timed out" not in two[1]["interrupted_between_looks"]["next"]["message"]


def test_a_thread_that_waits_while_another_leaves_has_an_error_and_memory(two: list[dict[str, Any]]) -> None:
    left = two[0]["left_by_another_thread"]
    assert left["lost"] and left["message"].startswith("the engine of this rank was left in another thread")
    assert left["took_s"] < 10
    assert [outcome["left_by_another_thread"]["left_open"] for outcome in two] == [0, 0]


def test_a_rank_has_not_left_because_a_process_forked_from_it_unwinds(two: list[dict[str, Any]]) -> None:
    assert [outcome["left_by_a_fork"]["error"] for outcome in two] == [None, None]


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


def test_ranks_of_an_engine_exchange_here_along_all_axes_with_the_answers_of_their_groups(
    two: list[dict[str, Any]],
) -> None:
    gather, to_all, scatter, _ = range(4)
    for outcome in two:
        for exchange, kinds in (("a2a", [gather, to_all]), ("ag_rs", [gather, scatter]), ("replicate_q", [gather])):
            auto, group = outcome["layout"][f"{exchange} auto"], outcome["layout"][f"{exchange} group"]
            assert (auto["kinds"], group["kinds"]) == (kinds, [])
            assert (auto["tokens"], auto["logprobs"]) == (group["tokens"], group["logprobs"])
            assert (auto["same_topology"], group["same_topology"]) == (False, True)
        assert outcome["layout"]["left_open"] == 0
