"""Several streams of one engine open at once: each gives what it gives alone, whoever takes the next result."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_engine_parity import grid_name

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import StreamEndedError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2), RankGrid(pcp_size=2, dcp_size=1)]
PROMPTS = prompts_of((5, 40, 17, 33, 8, 21), vocab_size=128)
NAMED = [{"prompt_token_ids": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
CALLS = [
    (PROMPTS[:3], [SamplingParams(temperature=0, max_new_tokens=n) for n in (3, 9, 6)]),
    (NAMED[2:5], SamplingParams(temperature=1.0, seed=3, n=2, max_new_tokens=5)),
    (PROMPTS[4:], [SamplingParams(temperature=0, max_new_tokens=n, prompt_logprobs=True) for n in (4, 14)]),
]


def on_all_ranks(grid: RankGrid, body: Callable[[cpinfer.Engine], Any], **config: Any) -> Any:
    """What every rank's `body` returns, which must be the same."""
    model = make_model(FAMILIES["qwen2"])
    keys = {"dtype": "float32", "kv_cache_gib": 2**-8, "max_num_batched_tokens": 32, "block_size": 4, **config}

    def attached(topology: cpinfer.Topology) -> Any:
        with cpinfer.attach(copy.deepcopy(model), topology, parse_config(keys)) as engine:
            return body(engine)

    first, *others = run_ranks(grid, attached)
    assert all(other == first for other in others)
    return first


def said(result: RolloutResult) -> tuple[Any, ...]:
    return result.prompt_index, result.sample_index, result.token_ids, result.finish_reason


def alone(grid: RankGrid) -> list[list[tuple[Any, ...]]]:
    return list(on_all_ranks(grid, lambda engine: [[said(r) for r in engine.generate(*call)] for call in CALLS]))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("seed", range(3))
def test_streams_that_are_taken_in_turn_give_what_each_gives_alone(grid: RankGrid, seed: int) -> None:
    def body(engine: cpinfer.Engine) -> list[list[tuple[Any, ...]]]:
        chance = random.Random(seed)  # the same on every rank
        streams: list[Iterator[RolloutResult]] = [engine.stream(*call) for call in CALLS]
        taken: list[list[tuple[Any, ...]]] = [[] for _ in streams]
        left = list(range(len(streams)))
        while left:
            place = chance.choice(left)
            result = next(streams[place], None)
            if result is None:
                left.remove(place)
            else:
                taken[place].append(said(result))
        assert engine.kv_capacity_tokens and all(home.pool.num_free >= 0 for home in engine._core.homes)
        return [sorted(results) for results in taken]

    assert on_all_ranks(grid, body) == alone(grid)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=grid_name)
def test_calls_may_be_made_while_a_stream_is_open(grid: RankGrid) -> None:
    def body(engine: cpinfer.Engine) -> list[list[tuple[Any, ...]]]:
        stream = engine.stream(*CALLS[0])
        results = [next(stream)]
        second = engine.generate(*CALLS[1])
        scores = engine.score([(PROMPTS[0], PROMPTS[1][:5])])
        third = engine.generate(*CALLS[2])
        results += stream
        assert scores == engine.score([(PROMPTS[0], PROMPTS[1][:5])])
        return [sorted(map(said, found)) for found in (results, second, third)]

    assert on_all_ranks(grid, body) == alone(grid)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=grid_name)
def test_a_stream_that_all_ranks_leave_takes_nothing_from_another(grid: RankGrid) -> None:
    def body(engine: cpinfer.Engine) -> list[tuple[Any, ...]]:
        kept = engine.stream(*CALLS[0])
        results = [next(kept)]
        for _ in engine.stream(*CALLS[1]):
            break
        results += kept
        assert engine._core.is_idle
        open_stream = engine.stream(*CALLS[2])
        next(open_stream)
        for call in (engine.sleep, engine.weights_changed):
            with pytest.raises(RuntimeError, match="while a stream is open"):
                call()
        open_stream.close()
        engine.sleep()
        engine.wake()
        return sorted(map(said, results))

    assert on_all_ranks(grid, body) == alone(grid)[0]


def test_a_stream_that_one_rank_leaves_ends_all_of_them_on_every_rank() -> None:
    model = make_model(FAMILIES["qwen2"])

    def body(topology: cpinfer.Topology) -> str:
        config = parse_config({"dtype": "float32", "kv_cache_gib": 2**-8})
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            other, stream = engine.stream(*CALLS[0]), engine.stream(*CALLS[2])
            next(other)
            next(stream)
            with pytest.raises(StreamEndedError) as caught:
                if topology.rank == 1:
                    stream.close()
                    engine.generate(PROMPTS[0])
                else:
                    list(stream)
            assert caught.value.places == (1,)
            with pytest.raises(RuntimeError, match="a step of another stream has failed"):
                list(other)  # what ended before is still given
            return str([said(r) for r in engine.generate(*CALLS[0])])

    first, second = run_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    assert first == second == str(alone(RankGrid())[0])


def test_a_text_that_cannot_be_read_closes_its_stream_whoever_holds_the_error() -> None:
    class Unreadable:
        def __call__(self, text: str) -> Any:
            return {"input_ids": [1, 2, 3]}

        def decode(self, token_ids: Any, **_: Any) -> str:
            raise ValueError("no such token")

    model = make_model(FAMILIES["qwen2"])
    with cpinfer.attach(model, dtype="float32", kv_cache_gib=2**-8, tokenizer=Unreadable()) as engine:
        with pytest.raises(ValueError, match="no such token") as caught:
            list(engine.stream(*CALLS[0]))
        assert caught.value is not None and engine._core.is_idle
        engine.sleep()


def test_in_a_pool_that_is_tight_streams_wait_for_each_other() -> None:
    config = {"kv_cache_gib": 2**-15}

    def body(engine: cpinfer.Engine) -> list[list[tuple[Any, ...]]]:
        streams = [engine.stream(*call) for call in CALLS]
        first = [next(stream) for stream in streams]
        results = [sorted(map(said, [one, *stream])) for one, stream in zip(first, streams, strict=True)]
        assert engine._core.scheduler.stats.num_preemptions > 0
        return results

    assert on_all_ranks(RankGrid(), body, **config) == alone(RankGrid())
