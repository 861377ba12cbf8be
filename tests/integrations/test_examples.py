"""What examples/ shows runs, in one process and in two, and comes to what it says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import agent_server
import generate
import grpo
import grpo_tools
import long_context_chat
import own_loop
import score
from launching import ROOT, accelerate, forked, launch, torchrun

Run = Callable[..., dict[str, Any]]
# What examples know a launcher by.
LAUNCHED = {"TORCHELASTIC_RUN_ID": "examples"}


@pytest.fixture
def last_line(capsys: pytest.CaptureFixture[str]) -> Run:
    def of(main: Callable[..., int], *arguments: Any) -> dict[str, Any]:
        assert main(*arguments) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return of


def test_generation_answers_from_its_prompts(last_line: Run) -> None:
    found = last_line(generate.main)
    assert found["answers"] == [" wants hammers", " fixes mirrors"] and len(found["samples"]) == 4


def test_scores_find_the_record_likeliest(last_line: Run) -> None:
    found = last_line(score.main)
    assert found["best"] == " wants hammers;" and found["logprobs"][0] == max(found["logprobs"])


def test_later_turns_of_a_chat_compute_what_is_new(last_line: Run) -> None:
    turns = last_line(long_context_chat.main)["turns"]
    assert [turn["answer"] for turn in turns] == [f" {does}" for does in long_context_chat.RECORDS.values()]
    new = [later["computed"] - turn["computed"] for turn, later in itertools.pairwise(turns)]
    assert turns[0]["computed"] > 2000 and max(new) < 10


def test_an_agent_reads_until_the_policy_is_sure(last_line: Run) -> None:
    found = last_line(agent_server.main)
    assert found["answer"] == [" wants hammers", " fixes mirrors", " carves lanterns"]
    assert found["pages_read"] == [2, 3, 1], "no page more than the one that says it"
    assert found["weights_version"] == [agent_server.WEIGHTS_VERSION] * 3


def test_an_agent_that_is_always_sure_reads_nothing(last_line: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what it answers comes from the pages, and that it reads them from the logprobs."""
    monkeypatch.setattr(agent_server, "SURE", 0.0)
    found = last_line(agent_server.main)
    assert found["pages_read"] == [0, 0, 0] and " wants hammers" not in found["answer"]


def test_a_loop_of_ones_own_learns_on_exact_rollouts(last_line: Run) -> None:
    found = last_line(own_loop.main, ["--steps", "16"])
    assert sum(found["rewards"][-4:]) > 4 * sum(found["rewards"][:4]) and found["max_mismatch"] <= 1e-4


def test_trl_trains_on_rollouts_of_ours(last_line: Run) -> None:
    found = last_line(grpo.main, ["--steps", "2"])
    assert len(found["rewards"]) == 2 and found["max_mismatch"] <= 1e-4


def test_trl_trains_with_tools(last_line: Run) -> None:
    found = last_line(grpo_tools.main, ["--steps", "1", "--warm-steps", "5"])
    assert len(found["rewards"]) == 1 and found["max_mismatch"] <= 1e-4


@pytest.mark.parametrize("example", [generate, long_context_chat, agent_server], ids=lambda example: example.__name__)
def test_two_ranks_find_what_one_does(last_line: Run, example: ModuleType) -> None:
    alone = last_line(example.main)
    run = forked(2, f"examples/{example.__name__}.py", timeout_s=100, env=LAUNCHED)
    assert run.returncode == 0, run
    # How much is found cached depends on where blocks end, which two shards have twice as far apart.
    assert {**run.summary, "cached_tokens": None} == {**alone, "cached_tokens": None}, run


def test_an_accelerate_job_evaluates() -> None:
    run = forked(2, "examples/evaluate.py", timeout_s=100, env={**LAUNCHED, "ACCELERATE_USE_CPU": "true"})
    assert run.returncode == 0, run
    assert run.summary == {"over 512": 1.0, "to 512": 1.0}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("example", ["evaluate", "grpo"])
def test_examples_of_accelerate_start_as_they_say(example: str) -> None:
    run = launch(accelerate(2, f"examples/{example}.py"), timeout_s=300, env={"ACCELERATE_USE_CPU": "true"})
    assert run.returncode == 0, run
    if example == "evaluate":
        assert run.summary == {"over 512": 1.0, "to 512": 1.0}
    else:
        assert run.summary["max_mismatch"] <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_loop_of_ones_own_starts_under_torchrun_and_learns() -> None:
    run = launch(torchrun(2, "examples/own_loop.py"), timeout_s=300)
    assert run.returncode == 0, run
    rewards = run.summary["rewards"]
    assert sum(rewards[-4:]) > 4 * sum(rewards[:4]) and run.summary["max_mismatch"] <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_grpo_learns_to_answer_and_which_book_to_ask(last_line: Run) -> None:
    for trained, num_steps in ((grpo, 30), (grpo_tools, 12)):
        rewards = last_line(trained.main, ["--steps", str(num_steps)])["rewards"]
        assert sum(rewards[-3:]) > 2 * sum(rewards[:3]), trained.__name__


def test_no_example_is_longer_than_can_be_read_at_once() -> None:
    allowed = {"agents_in_training": 400}  # a guide goes through it
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= allowed.get(path.stem, 100), path
