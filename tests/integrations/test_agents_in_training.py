"""The example of docs/guides/agents.md: it trains on exactly what was sampled, and its policy learns."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import pytest

import agents_in_training as example
from cpinfer.engine.open_requests import RequestOutput
from cpinfer_integrations.server_bridge import Bridge
from launching import BIN, ROOT, Finished, launch, torchrun

# What logprobs of both forwards may differ by, in float32 and at these lengths.
TOLERANCE = 1e-5
SCRIPT = "examples/agents_in_training.py"

pytestmark = pytest.mark.timeout(200)

Ids = tuple[tuple[int, ...], tuple[int, ...]]


def test_each_step_trains_on_the_tokens_that_the_engine_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[Ids] = []
    trained: list[Ids] = []
    hand_over, logprobs_of = Bridge.hand_over, example.logprobs_of

    def sampling(bridge: Bridge, outputs: Sequence[RequestOutput]) -> None:
        results = [output.result for output in outputs if output.result is not None]
        sampled.extend((tuple(result.prompt_token_ids), tuple(result.token_ids)) for result in results)
        hand_over(bridge, outputs)

    def training(model: Any, turns: Sequence[example.Turn], pad_token_id: int) -> Any:
        said = [turn for turn in turns if turn.logprobs]  # those of the warm-up nobody has sampled
        trained.extend((tuple(turn.prompt_token_ids), tuple(turn.token_ids)) for turn in said)
        return logprobs_of(model, turns, pad_token_id)

    monkeypatch.setattr(example, "logprobs_of", training)
    monkeypatch.setattr(Bridge, "hand_over", sampling)
    for step in example.train(num_steps=2, num_warm_steps=60):
        assert sorted(trained) == sorted(sampled)
        assert len(sampled) > len(example.NAMES) * example.GROUP_SIZE  # many have called the tool, and were asked again
        assert math.isfinite(step.mean_reward) and 0 < step.mismatch < TOLERANCE
        sampled.clear()
        trained.clear()


def test_what_the_guide_shows_stands_in_the_example() -> None:
    guide = (ROOT / "docs" / "guides" / "agents.md").read_text(encoding="utf-8")
    section = guide.split("\n## The example, in order\n")[1].split("\n## ")[0]
    shown = [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]
    lines = {line.strip() for line in (ROOT / SCRIPT).read_text(encoding="utf-8").splitlines()}
    assert shown and all(line.strip() in lines for code in shown for line in code.splitlines() if line.strip())


def check_learned(finished: Finished) -> None:
    assert finished.returncode == 0, finished
    rewards = finished.summary["rewards"]
    assert len(rewards) == 12 and sum(rewards[-3:]) > sum(rewards[:3]) + 3 * 0.3, finished
    assert finished.summary["max_mismatch"] < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_policy_learns_which_book_to_ask() -> None:
    check_learned(launch([str(BIN / "python"), SCRIPT], timeout_s=300))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_policy_learns_from_agents_of_two_ranks() -> None:
    check_learned(launch(torchrun(2, SCRIPT), timeout_s=300))
