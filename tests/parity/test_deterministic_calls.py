"""The deterministic mode, however it is asked: scores, streams, pooled prompts, turns that are aborted, new weights.

Each gives the bits of one rank that generates, in one call, what they come to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_deterministic import CONFIG, DTYPES, ONE, PROMPTS, SAMPLING, VOCAB, WAYS, model_of, outcomes, run

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from tiny_models import FAMILIES

# One by which all are judged, one whose chunks and decode rows are shared by ranks, and one of two homes.
LAYOUTS = {"one rank": (ONE, {}), **{way: WAYS[way] for way in ("pcp2 dcp2, odd chunks", "pcp4 dcp2, two homes")}}
LISTS = [prompt["prompt_token_ids"] for prompt in PROMPTS]
GREEDY = replace(SAMPLING, temperature=0.0, n=1)

pytestmark = pytest.mark.timeout(240)

FAST = ("qwen2", "float32")
OTHERS = [(family, dtype) for family in FAMILIES for dtype in DTYPES if (family, dtype) != FAST]
of_models = pytest.mark.parametrize(
    ("family", "dtype"), [FAST, *(pytest.param(*model, marks=pytest.mark.slow) for model in OTHERS)]
)


def on_every_layout(model: Any, body: Callable[..., Any], **changes: Any) -> Iterator[list[Any]]:
    """What `body(engine, topology, model)`, the model a copy, returns on the ranks of one layout after another."""
    for grid, config in LAYOUTS.values():
        with_keys = parse_config({**CONFIG, **config, **changes})

        def attached(topology: cpinfer.Topology, config: Any = with_keys) -> Any:
            own = copy.deepcopy(model)
            with cpinfer.attach(own, topology, config) as engine:
                return body(engine, topology, own)

        yield run_ranks(grid, attached)


def generated(model: Any, prompt: Sequence[int], num_tokens: int) -> Any:
    """Greedily behind a prompt, by one rank: tokens, logprobs of all the vocabulary."""
    sampling = replace(GREEDY, max_new_tokens=num_tokens)
    ((_, _, tokens, *_, top),) = run(model, prompts=[{"prompt_token_ids": list(prompt)}], sampling=sampling)
    return tokens, top


def told(results: Sequence[Any]) -> list[Any]:
    return sorted(outcomes(results), key=lambda outcome: outcome[:2])


@of_models
def test_scores_and_logprobs_of_prompts_are_those_of_rollouts(family: str, dtype: str) -> None:
    model = model_of(family, dtype)
    rolled = run(model, sampling=replace(SAMPLING, max_new_tokens=20))
    pairs = [(LISTS[i // 2], tokens) for i, (_, _, tokens, *_) in enumerate(rolled)]
    echo = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=True, top_logprobs=VOCAB)

    def body(engine: Any, *_: Any) -> Any:
        scores = engine.score(pairs)
        assert scores == engine.score(pairs), "once more, from what is cached"
        whole = engine.generate([[*prompt, *tokens] for prompt, tokens in pairs], echo)
        return scores, [(r.prompt_logprobs, r.prompt_top_logprobs) for r in whole]

    first = None
    for (scores, echoed), *_ in on_every_layout(model, body):
        assert [score.logprobs for score in scores] == [logprobs for _, _, _, logprobs, *_ in rolled]
        for (prompt, _), (logprobs, top), (_, _, _, expected, _, expected_top) in zip(
            pairs, echoed, rolled, strict=True
        ):
            assert logprobs[len(prompt) :] == expected and top[len(prompt) :] == expected_top
        first = first or echoed
        assert echoed == first, "and so are those of the prompt itself"


def test_without_the_mode_scores_differ() -> None:
    """Negative control."""
    model = model_of("qwen2", "float32")
    rolled = run(model, deterministic=False)
    pairs = [(LISTS[i // 2], tokens) for i, (_, _, tokens, *_) in enumerate(rolled)]

    def body(engine: Any, *_: Any) -> Any:
        return [score.logprobs for score in engine.score(pairs)]

    found = [ranks[0] for ranks in on_every_layout(model, body, deterministic=False)]
    assert found[0] != [logprobs for _, _, _, logprobs, *_ in rolled] and found[1] != found[0]


@of_models
def test_streams_that_are_taken_in_turn_and_left(family: str, dtype: str) -> None:
    model = model_of(family, dtype)
    expected = run(model)

    def body(engine: Any, *_: Any) -> None:
        streams = [engine.stream(PROMPTS[:4], SAMPLING), engine.stream(PROMPTS[4:], SAMPLING)]
        left = engine.stream(PROMPTS, replace(SAMPLING, seed=6))
        results: list[Any] = [next(streams[0]), next(left), next(streams[1]), next(left)]
        del results[1], results[2:]
        left.close()
        engine.score([(LISTS[3], LISTS[0])])
        for stream in reversed(streams):
            results += stream
        # Some of it by a stream that leaves out what is there.
        skip = frozenset({(0, 0), (3, 1), (5, 0)})
        rest = list(engine.stream(PROMPTS, SAMPLING, skip))
        assert told(rest) == [o for i, o in enumerate(sorted(expected)) if (i // 2, i % 2) not in skip]
        assert told(results) == sorted(expected)

    list(on_every_layout(model, body))


@of_models
def test_pooled_prompts(family: str, dtype: str) -> None:
    """Every rank brings some, also the same ones, and takes its own."""
    model = model_of(family, dtype)
    own = [[LISTS[3], LISTS[0], LISTS[3]], [], [LISTS[5], LISTS[3]], [LISTS[0], LISTS[6]]]
    distinct = [3, 0, 5, 6]  # as they come first
    named = [{"prompt_token_ids": LISTS[i], "id": f"some/0/{place}"} for place, i in enumerate(distinct)]
    samples = [replace(SAMPLING, n=sum(lists.count(LISTS[i]) for lists in own)) for i in distinct]
    alone = run(model, prompts=named, sampling=samples)  # type: ignore[arg-type]

    def body(engine: Any, topology: cpinfer.Topology, _: Any) -> Any:
        brought = [tokens for lists in own[topology.rank :: topology.grid.world_size] for tokens in lists]
        return outcomes(engine.generate_pooled(brought, replace(SAMPLING, n=1), name="some"))

    for ranks in on_every_layout(model, body):
        assert sorted((o for rank in ranks for o in rank), key=lambda o: o[:2]) == alone


@of_models
def test_turns_that_are_aborted_and_those_behind_them(family: str, dtype: str) -> None:
    model = model_of(family, dtype)
    long = replace(GREEDY, max_new_tokens=40)

    def body(engine: Any, topology: cpinfer.Topology, _: Any) -> Any:
        lists = LISTS[topology.rank :] + LISTS[: topology.rank]  # each rank opens other sessions
        sessions = [engine.open_session(tokens) for tokens in lists[:2]]
        lost = engine.add(lists[3], long)
        done: dict[str, Any] = {}
        found = []
        for turn, (new, num_tokens) in enumerate((([], 5), ([7, 8, 9], 3), (LISTS[4], 9))):
            names = [engine.add(new, long, session=session) for session in sessions]
            if turn == 2:  # one that is over before it begins
                engine.abort(names[1])
            so_far: dict[str, int] = dict.fromkeys(names, 0)

            def ended(
                outputs: list[Any], names: Any = names, so_far: Any = so_far, num_tokens: int = num_tokens
            ) -> bool:
                for output in outputs:
                    so_far[output.request_id] = so_far.get(output.request_id, 0) + len(output.token_ids)
                    if output.result is not None:
                        done[output.request_id] = output.result
                for name in names:
                    if so_far[name] >= num_tokens and name not in done:
                        engine.abort(name)
                if so_far.get(lost, 0) > 2:
                    engine.abort(lost)
                return all(name in done for name in names)

            engine.run_until(ended)
            found += [done[name] for name in names]
        for session in sessions:
            engine.close_session(session)
        engine.step()
        assert {result.finish_reason for result in found} == {"abort"}
        return [(r.prompt_token_ids, r.token_ids, r.top_logprobs) for r in found if r.token_ids]

    for ranks in on_every_layout(model, body):
        for prompt, tokens, top in [turn for rank in ranks[:2] for turn in rank]:
            assert generated(model, prompt, len(tokens)) == (tokens, top)


def moved(model: Any) -> None:
    """Other weights, in place."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.0625)


@of_models
def test_weights_that_change_between_calls_and_while_requests_are_open(family: str, dtype: str) -> None:
    model = model_of(family, dtype)
    after = copy.deepcopy(model)
    moved(after)
    expected = run(model), run(after)
    assert expected[0] != expected[1]
    long = replace(GREEDY, max_new_tokens=12)

    def body(engine: Any, _: cpinfer.Topology, own: Any) -> Any:
        assert outcomes(engine.generate(PROMPTS, SAMPLING)) == expected[0]
        session = engine.open_session(LISTS[6])
        names = [engine.add(LISTS[3], long), engine.add([], long, session=session)]
        tokens: dict[str, list[Any]] = {name: [] for name in names}
        results: dict[str, Any] = {}
        for step in range(200):
            if step == 7:  # in the middle of all of them
                assert all(0 < len(of) < 12 for of in tokens.values())
                moved(own)
                engine.weights_changed()
            for output in engine.step():
                tokens[output.request_id] += [output.weights_version] * len(output.token_ids)
                if output.result is not None:
                    results[output.request_id] = output.result
            if engine._core.is_idle:
                break
        assert outcomes(engine.generate(PROMPTS, SAMPLING)) == expected[1]
        engine.sleep()
        engine.wake()
        assert outcomes(engine.generate(PROMPTS, SAMPLING)) == expected[1]
        engine.close_session(session)
        engine.step()
        return [(results[name], tokens[name].count(0)) for name in names]

    for ranks in on_every_layout(model, body):
        for result, by_first in ranks[0]:
            assert 0 < by_first < 12
            prompt, (tokens, top) = result.prompt_token_ids, (result.token_ids, result.top_logprobs)
            assert generated(model, prompt, by_first) == (tokens[:by_first], top[:by_first])
            behind = (*prompt, *tokens[:by_first])
            assert generated(after, behind, 12 - by_first) == (tokens[by_first:], top[by_first:])


def test_adapters_that_are_switched_between_calls() -> None:
    adapted = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model_of("qwen2", "float32"), adapted)
    model.add_adapter("other", adapted)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = run(model)
    assert expected["default"] != expected["other"]
    model.set_adapter("default")

    def body(engine: Any, _: cpinfer.Topology, own: Any) -> None:
        for name in ("default", "other", "default"):
            own.set_adapter(name)
            assert outcomes(engine.generate(PROMPTS, SAMPLING)) == expected[name]

    list(on_every_layout(model, body))
