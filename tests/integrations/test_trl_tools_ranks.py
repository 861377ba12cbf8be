"""Samples with tools on several ranks, whose tools take different times: the tokens are the same in every layout."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tool_trainers import by_cpinfer, drawn, make_trainer

import cpinfer
from cpinfer_integrations import trl_phases
from launching import forked

WORKER = "tests/integrations/tool_worker.py"
LAYOUTS = ("replicas", "pcp2_dcp1", "pcp2_dcp2")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By scenario, what every rank found."""
    finished = forked(2, WORKER, str(tmp_path_factory.mktemp("trainers")), timeout_s=280)
    assert finished.returncode == 0, finished
    return finished.summary


def test_every_layout_and_pace_gives_the_samples_of_trls_own_loop(outcomes: Any) -> None:
    for found in outcomes["layouts"]:
        for layout in LAYOUTS:
            assert found[f"greedy {layout}"] == found["trl"]
            assert found[f"sampled {layout}"] == found["sampled lockstep"]
        assert found["sampled lockstep"] != found["trl"]
    first, second = outcomes["layouts"]
    assert first["trl"]["num_calls"] != second["trl"]["num_calls"], "ranks have loops of different lengths"


def test_what_ends_one_rank_ends_all_and_leaves_every_trainer_as_it_was(outcomes: Any) -> None:
    told, own = (found["said"] for found in outcomes["thread"])
    died = own.removeprefix("RuntimeError: ")
    assert re.fullmatch(r"a tool of sample \d ended its thread with SystemExit\('no more tools'\)", died)
    assert told == f"UserError: rank 1 could not finish its samples: {died}"
    interrupted, other = (found["said"] for found in outcomes["interrupt"])
    assert interrupted == "KeyboardInterrupt: " and other.startswith(("RanksDifferError", "StreamEndedError"))
    assert all(found["changed"] == [] for kind in ("thread", "interrupt") for found in outcomes[kind])


def test_of_ranks_that_train_on_the_same_data_the_first_calls_the_tools(outcomes: Any) -> None:
    alone = outcomes["layouts"][0]["trl"]
    assert [found["num_calls"] for found in outcomes["copies"]] == [alone["num_calls"], 0]
    for found in outcomes["copies"]:
        assert (found["completion_ids"], found["tool_mask"]) == (alone["completion_ids"], alone["tool_mask"])


def test_environments_of_such_ranks_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank's would see the calls, and rewards read all."""

    class Empty:
        def reset(self, **_: Any) -> None:
            pass

        def follow(self, name: str) -> str:
            """Whom to ask next.

            Args:
                name: whom to ask.
            """
            return name

    lend = trl_phases.lend
    monkeypatch.setattr(trl_phases, "lend", lambda *args: replace(lend(*args), num_copies=2))
    trainer = make_trainer(by_cpinfer(), tmp_path, tools=None, given={"environment_factory": Empty})
    with pytest.raises(cpinfer.UnsupportedError, match=r"2 ranks with the same data: .*environments of a GRPOTrainer"):
        drawn(trainer)


@pytest.mark.parametrize(
    ("kind", "how"), [("zero2", "in_place"), ("zero3 full", "full"), ("zero3 layerwise", "layerwise")]
)
def test_training_under_zero_has_the_training_forwards_logprobs_of_all_turns(
    outcomes: Any, kind: str, how: str
) -> None:
    for found in outcomes[kind]:
        assert found["how"] == [how, how] and max(found["max_abs"]) <= 1e-4
        assert found["num_compared"] == found["num_generated"] and found["num_calls"] > 0
