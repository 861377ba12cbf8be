"""Loops of samples on sessions: whatever a loop does with its turns, a turn continues what it was asked to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer_integrations.trl_tools import NextTurn, ToolLoops
from tiny_models import FAMILIES, make_model

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20, stop_token_ids=tuple(range(23, 40)))
PROMPTS = [[11, 12, 13], [11, 12, 14], [21, 22]]
ANSWER = [31, 32, 33]


@pytest.fixture
def engine() -> Iterator[cpinfer.Engine]:
    with cpinfer.attach(make_model(FAMILIES["qwen2"]), dtype="float32", kv_cache_gib=0.01) as engine:
        yield engine


def continued(engine: cpinfer.Engine, token_ids: list[int], max_new_tokens: int) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, stop_token_ids=GREEDY.stop_token_ids)
    return list(engine.generate(token_ids, sampling)[0].token_ids)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kept", [None, 0, 1])
def test_a_turn_continues_what_its_loop_asks_for_whether_its_session_holds_it_or_not(
    engine: cpinfer.Engine, in_order: bool, kept: int | None
) -> None:
    """`kept`: how many tokens of the first turn a loop leaves in place; None: all."""

    def loop(index: int, first: Any, next_turn: NextTurn) -> tuple[list[int], list[int]]:
        asked = [*PROMPTS[index], *first.token_ids[:kept], *ANSWER]
        turn = next_turn(asked)
        assert turn is not None and list(turn.prompt_token_ids) == asked
        return asked, list(turn.token_ids)

    loops = ToolLoops(engine, PROMPTS, GREEDY, "step", loop, in_order=in_order)
    loops.run()
    results = loops.results()
    assert [list(turns[0].prompt_token_ids) for turns, _ in results] == PROMPTS
    assert max(len(turns[0].token_ids) for turns, _ in results) > 1
    for prompt, (turns, (asked, token_ids)) in zip(PROMPTS, results, strict=True):
        assert list(turns[0].token_ids) == continued(engine, prompt, 20)
        assert token_ids == continued(engine, asked, 20 - (len(asked) - len(prompt)))


def test_where_nothing_is_left_of_the_length_there_is_no_turn(engine: cpinfer.Engine) -> None:
    def loop(index: int, first: Any, next_turn: NextTurn) -> Any:
        return next_turn([*PROMPTS[index], *range(20)])

    loops = ToolLoops(engine, PROMPTS, GREEDY, "step", loop, in_order=False)
    loops.run()
    assert [outcome for _, outcome in loops.results()] == [None] * 3


@pytest.mark.parametrize("in_order", [False, True])
def test_an_error_of_one_sample_ends_all_while_others_run_and_wait(engine: cpinfer.Engine, in_order: bool) -> None:
    ended: list[int] = []

    def loop(index: int, first: Any, next_turn: NextTurn) -> None:
        if index == 1:
            raise ValueError("no such template")
        try:
            while True:
                next_turn(PROMPTS[index])
        finally:
            ended.append(index)

    loops = ToolLoops(engine, PROMPTS, replace(GREEDY, stop_token_ids=()), "step", loop, in_order=in_order)
    loops.run()
    with pytest.raises(ValueError, match="no such template"):
        loops.results()
    deadline = time.monotonic() + 5
    # In order the third has not begun when the second fails.
    while sorted(ended) != ([0] if in_order else [0, 2]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(ended) == ([0] if in_order else [0, 2])
    assert continued(engine, PROMPTS[0], 20), "the engine goes on"


def test_a_prompt_that_can_never_run_is_an_error_and_nothing_is_left_under_way(engine: cpinfer.Engine) -> None:
    loops = ToolLoops(engine, [PROMPTS[0], [11] * 600], GREEDY, "step", lambda *_: None, in_order=False)
    loops.run()
    with pytest.raises(cpinfer.UserError, match="the prompt has 600 tokens"):
        loops.results()
    assert continued(engine, PROMPTS[0], 20)
