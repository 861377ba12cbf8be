"""Requests that ranks add while others run: each gives what it gives alone, whenever it comes, in every layout."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from test_engine_parity import grid_name

import cpinfer
from covering import pairs
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.engine import Engine
from cpinfer.errors import EngineFaultError, RanksDifferError, StreamEndedError, UserError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

GRIDS = [
    RankGrid(),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(pcp_size=2, dcp_size=1),
    RankGrid(pcp_size=4, dcp_size=2),
]
PROMPTS = prompts_of((5, 40, 17, 33, 8, 21, 30, 12), vocab_size=128)
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
# Qwen2 has attention over everything, Mistral a window, and DeepSeek V2 a latent cache.
WITH_SESSIONS = ["qwen2", "mistral", "deepseek_v2"]
CONFIG = {"dtype": "float32", "kv_cache_gib": 2**-8, "max_num_batched_tokens": 32, "block_size": 4}


def on_ranks(grid: RankGrid, body: Callable[[Engine, int], Any], family: str = "qwen2", **config: Any) -> list[Any]:
    """What each rank's `body` returns, which is given its place."""
    model = make_model(FAMILIES[family])

    def attached(topology: cpinfer.Topology) -> Any:
        with cpinfer.attach(copy.deepcopy(model), topology, parse_config({**CONFIG, **config})) as engine:
            return body(engine, topology.rank)

    return run_ranks(grid, attached)


class Consumer:
    """What one rank's outputs tell of its requests, by id and sample: pieced together, and as the results have it."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.results: dict[tuple[str, int], cpinfer.RolloutResult] = {}
        self.reasons: dict[tuple[str, int], str] = {}

    def take(self, outputs: list[cpinfer.RequestOutput]) -> None:
        for output in outputs:
            key = (output.request_id, output.sample_index)
            assert key not in self.reasons, "it has ended"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            self.logprobs.setdefault(key, []).extend(output.logprobs)
            if output.finish_reason is not None:
                self.reasons[key] = output.finish_reason
            if output.result is not None:
                self.results[key] = output.result
                assert self.tokens[key] == list(output.result.token_ids)
                assert self.logprobs[key] == list(output.result.logprobs)

    def until(self, engine: Engine, num_ended: int) -> None:
        """Steps until so many samples of this rank have ended, and those that the other ranks wait for."""

        def has_all(outputs: list[cpinfer.RequestOutput]) -> bool:
            self.take(outputs)
            return len(self.reasons) >= num_ended

        engine.run_until(has_all)


def test_the_load_tells_what_is_under_way() -> None:
    def body(engine: Engine, _: int) -> Any:
        engine.add(PROMPTS[0], GREEDY)
        engine.add(PROMPTS[1], GREEDY)
        loads = []
        while not loads or loads[-1].num_running:
            engine.step()
            loads.append(engine.load)
        return loads

    (loads,) = on_ranks(RankGrid(), body)
    assert max(load.num_running for load in loads) == 2 and max(load.kv_usage for load in loads) > 0
    assert loads[0].num_waiting > 0 == loads[-1].num_waiting
    assert loads[-1].stats.num_generated_tokens == 12 > loads[0].stats.num_generated_tokens


def alone(prompt: Any, sampling: SamplingParams, family: str = "qwen2", name: str | None = None) -> list[list[int]]:
    """The samples of a prompt that nothing runs beside."""
    given = prompt if name is None else {"prompt_token_ids": prompt, "id": name}
    return [
        list(r.token_ids) for r in on_ranks(RankGrid(), lambda engine, _: engine.generate([given], sampling), family)[0]
    ]


@pytest.mark.parametrize(("grid", "seed"), pairs(GRIDS, range(2), grid_name))
def test_what_ranks_add_at_any_time_gives_what_it_gives_alone(grid: RankGrid, seed: int) -> None:
    """Each rank adds when its own chance says so, under ids of its own, and gets its own answers."""
    sampling = SamplingParams(temperature=1.0, seed=5, n=2, max_new_tokens=7)

    def body(engine: Engine, rank: int) -> dict[tuple[str, int], list[int]]:
        chance, consumer = random.Random(f"{seed}/{rank}"), Consumer()
        waiting = [{"prompt_token_ids": PROMPTS[i], "id": f"{rank}-{i}"} for i in range(len(PROMPTS))][rank::2]
        total = 2 * len(waiting)

        def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
            consumer.take(outputs)
            while waiting and chance.random() < 0.3:
                engine.add(waiting.pop(), sampling, priority=chance.choice((0, 0, 3)))
            return len(consumer.results) == total

        engine.run_until(condition)
        assert engine.step() == [] and engine._core.is_idle
        return consumer.tokens

    found: dict[tuple[str, int], list[int]] = {}
    for tokens in on_ranks(grid, body):
        found |= tokens
    for name in {name for name, _ in found}:
        wanted = alone(PROMPTS[int(name.split("-")[1])], sampling, name=name)
        assert [found[name, 0], found[name, 1]] == wanted
    assert len(found) == 2 * sum(len(range(len(PROMPTS))[rank::2]) for rank in range(grid.world_size))


@pytest.mark.parametrize(("grid", "family"), pairs(GRIDS, WITH_SESSIONS, grid_name))
def test_the_turns_of_a_session_are_those_of_the_whole_sequence_and_compute_only_what_is_new(
    grid: RankGrid, family: str
) -> None:
    def body(engine: Engine, rank: int) -> list[Any]:
        chance, seen = random.Random(rank), []
        session = engine.open_session(PROMPTS[rank + 1])
        for turn in range(4):
            new = [chance.randrange(128) for _ in range(chance.choice((0, 1, 5, 19)))]
            before = session.token_ids
            name = engine.add(new, GREEDY, session=session)
            consumer = Consumer()
            consumer.until(engine, 1)
            result = consumer.results[name, 0]
            assert name == f"{session.id}/{turn}" and session.num_turns == turn + 1
            assert result.prompt_token_ids == (*before, *new)
            assert session.token_ids == (*result.prompt_token_ids, *result.token_ids)
            seen.append((result.prompt_token_ids, result.token_ids, result.logprobs))
        computed = engine._core.scheduler.stats.num_computed_prefill_tokens
        engine.close_session(session)
        engine.step()
        assert engine._core.is_idle and not list(engine._core.scheduler._kept)
        return [seen, computed]

    found = on_ranks(grid, body, family)
    new_tokens = 0
    for seen, _ in found:
        new_tokens += len(seen[0][0]) + sum(len(b[0]) - len(a[0]) - len(a[1]) + 1 for a, b in pairwise(seen))
        for prompt, tokens, logprobs in seen:
            whole = on_ranks(RankGrid(), lambda engine, _: engine.generate([prompt], GREEDY), family)[0][0]  # noqa: B023
            assert whole.token_ids == tokens
            assert whole.logprobs == pytest.approx(logprobs, abs=2e-5)
    assert {computed for _, computed in found} == {new_tokens}


def test_sessions_under_pressure_and_beyond_their_limit_are_computed_anew_and_nothing_leaks() -> None:
    def body(engine: Engine, rank: int) -> list[list[tuple[int, ...]]]:
        chance, told = random.Random(3), []
        sessions = [engine.open_session(prompt) for prompt in PROMPTS]
        for _ in range(3):
            names = [engine.add([chance.randrange(128)], GREEDY, session=session) for session in sessions]
            consumer = Consumer()
            consumer.until(engine, len(names))
            told.append([consumer.results[name, 0].token_ids for name in names])
        for session in sessions:
            engine.close_session(session)
        engine.step()
        engine._core.scheduler.check_integrity()
        assert not list(engine._core.scheduler._kept) and not engine._open._last_turns and not engine._open._sessions
        return told

    grid = RankGrid(pcp_size=2, dcp_size=2)
    free = on_ranks(grid, body)[0]
    assert on_ranks(grid, body, kv_cache_gib=2**-14)[0] == free
    assert on_ranks(grid, body, max_session_tokens=60)[0] == free
    assert on_ranks(grid, body, max_session_tokens=0, enable_prefix_caching=False)[0] == free


def test_an_aborted_request_keeps_what_it_has_and_frees_its_blocks() -> None:
    long = SamplingParams(temperature=0, max_new_tokens=60, ignore_eos=True)

    def body(engine: Engine, rank: int) -> None:
        consumer, free = Consumer(), [home.pool.num_free for home in engine._core.homes]
        running, waiting = (engine.add(prompt, long) for prompt in PROMPTS[:2])
        session = engine.open_session(PROMPTS[2])
        turn = engine.add([], long, session=session)

        def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
            consumer.take(outputs)
            if len(consumer.tokens.get((running, 0), ())) == 3:
                for name in (running, waiting, turn, "unknown"):
                    engine.abort(name)
            return len(consumer.reasons) == 3

        engine.run_until(condition)
        assert {*consumer.reasons.values()} == {"abort"}
        assert 3 <= len(consumer.tokens[running, 0]) < 8
        ended = consumer.results[running, 0]
        assert ended.finish_reason == "abort" and len(ended.token_ids) == len(ended.logprobs)
        # A session goes on behind what was generated.
        assert session.token_ids == (*PROMPTS[2], *consumer.tokens[turn, 0]) and session.num_turns == 1
        name = engine.add([9], GREEDY, session=session)
        consumer.until(engine, 4)
        assert consumer.results[name, 0].prompt_token_ids == (*PROMPTS[2], *consumer.tokens[turn, 0], 9)
        again = engine.generate([consumer.results[name, 0].prompt_token_ids], GREEDY)[0]
        assert again.token_ids == consumer.results[name, 0].token_ids
        engine.close_session(session)
        engine.step()
        for home in engine._core.homes:
            home.prefixes.evict(home.pool.num_blocks)
        assert [home.pool.num_free for home in engine._core.homes] == free

    for grid in GRIDS[:2]:
        on_ranks(grid, body, max_num_seqs=2)


def test_an_abort_of_a_request_that_was_never_computed_has_a_result_without_tokens() -> None:
    def body(engine: Engine, rank: int) -> None:
        name = engine.add(PROMPTS[0])
        engine.abort(name)
        (output,) = engine.step()
        assert (output.finish_reason, output.token_ids, output.result.ttft_s) == ("abort", (), None)

    on_ranks(RankGrid(), body)


def test_streams_and_calls_go_on_beside_what_is_added() -> None:
    def body(engine: Engine, rank: int) -> list[list[int]]:
        consumer = Consumer()
        mine = engine.add(PROMPTS[rank], GREEDY)
        consumer.take(engine.step())
        stream = engine.stream(PROMPTS[2:5], GREEDY)
        first = next(stream)
        results = engine.generate(PROMPTS[5:], GREEDY)
        consumer.until(engine, 1)
        streamed = sorted([first, *stream], key=lambda r: r.prompt_index)
        return [consumer.tokens[mine, 0], *(list(r.token_ids) for r in (*streamed, *results))]

    for rank, found in enumerate(on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)):
        assert found == [alone(prompt, GREEDY)[0] for prompt in (PROMPTS[rank], *PROMPTS[2:])]


def test_weights_that_change_within_a_request_are_told_by_span() -> None:
    answer = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)

    def body(engine: Engine, rank: int) -> tuple[Any, ...]:
        consumer, versions = Consumer(), []
        session = engine.open_session(PROMPTS[3])
        turn = engine.add([], SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True), session=session)
        consumer.until(engine, 1)
        name = engine.add(PROMPTS[2], answer)
        while len(consumer.tokens.get((name, 0), ())) < 3:
            consumer.take(engine.step())
        head = engine._runner._model.get_output_embeddings().weight
        head.data.mul_(-1.0)
        engine.weights_changed()
        second = engine.add([5], answer, session=session)
        while len(consumer.reasons) < 3:
            outputs = engine.step()
            versions += [o.weights_version for o in outputs if o.request_id == name]
            consumer.take(outputs)
        result = consumer.results[name, 0]
        assert {*versions} == {1} and result.weights_version == 1
        assert result.weights_versions == ((0, 3), (1, 5))
        assert (
            consumer.results[turn, 0].weights_versions is None and consumer.results[second, 0].weights_versions is None
        )
        behind = engine.generate(
            [(*PROMPTS[2], *result.token_ids[:3])], SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
        )
        assert behind[0].token_ids == result.token_ids[3:]
        whole = engine.generate([consumer.results[second, 0].prompt_token_ids], answer)[0]
        assert whole.token_ids == consumer.results[second, 0].token_ids
        return result.token_ids

    first, second = on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    assert first == second


def test_bad_input_is_told_where_it_is_given_and_nobody_else_is_disturbed() -> None:
    def body(engine: Engine, rank: int) -> None:
        session, other = engine.open_session(PROMPTS[0]), engine.open_session(PROMPTS[1])
        if rank == 1:
            for call, told in (
                (lambda: engine.add([], GREEDY), "0 prompts"),
                (lambda: engine.add([[1], [2]], GREEDY), "2 prompts"),
                (lambda: engine.add([{"role": "user", "content": "hi"}], GREEDY), '"messages" needs a tokenizer'),
                (lambda: engine.add([128], GREEDY), "token id 128"),
                (lambda: engine.add([1] * 5000, GREEDY), "positions"),
                (lambda: engine.add([1], GREEDY, priority="high"), "priority"),
                (lambda: engine.add([1], {"n": 2}), "SamplingParams"),
                (lambda: engine.add("text", GREEDY), "tokenizer"),
                (lambda: engine.add("text", GREEDY, session=session), "list of token ids"),
                (lambda: engine.add([128], GREEDY, session=session), "token id 128"),
                (lambda: engine.add([1] * 5000, GREEDY, session=session), "positions"),
                (lambda: engine.add([1], SamplingParams(n=2), session=session), "one sample"),
                (lambda: engine.add([1], GREEDY, session="s"), "no session"),
                (lambda: engine.close_session("s"), "no session"),
                (lambda: engine.open_session([]), "0 prompts"),
                (lambda: engine.open_session({"prompt_token_ids": [1], "id": session.id}), "session with the id"),
                (lambda: engine.open_session({"prompt_token_ids": [1], "sampling": {"n": 2}}), "sampling"),
            ):
                with pytest.raises(UserError, match=told):
                    call()
            engine.add({"prompt_token_ids": [1], "id": "named"}, GREEDY)
            with pytest.raises(UserError, match="named"):
                engine.add({"prompt_token_ids": [1], "id": "named"}, GREEDY)
            engine.add([], GREEDY, session=session)
            with pytest.raises(UserError, match="turn under way"):
                engine.add([], GREEDY, session=session)
        engine.close_session(other)
        with pytest.raises(UserError, match="is closed"):
            engine.add([1], GREEDY, session=other)
        with pytest.raises(UserError, match="is closed"):
            engine.close_session(other)
        consumer = Consumer()
        consumer.until(engine, 2 * rank)
        assert len(consumer.results) == 2 * rank
        engine.close()
        for use in (engine.step, lambda: engine.add([1]), lambda: engine.open_session([1]), lambda: engine.abort("x")):
            with pytest.raises(RuntimeError, match="has ended"):
                use()

    on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


def test_a_step_that_fails_says_what_it_took_along_and_sessions_are_what_they_were() -> None:
    def body(engine: Engine, rank: int) -> tuple[tuple[int, ...], list[int]]:
        consumer = Consumer()
        session = engine.open_session(PROMPTS[rank])
        engine.add([], GREEDY, session=session)
        consumer.until(engine, 1)
        before = session.token_ids
        lost = [engine.add([3], GREEDY, session=session), engine.add(PROMPTS[4], SamplingParams(n=2, max_new_tokens=5))]
        head = engine._runner._model.get_output_embeddings().weight
        kept = head.data.clone()
        head.data.fill_(float("nan"))
        with pytest.raises(EngineFaultError):
            while True:
                consumer.take(engine.step())
        head.data.copy_(kept)
        consumer.until(engine, 4)
        assert {key: reason for key, reason in consumer.reasons.items() if reason == "error"} == {
            (lost[0], 0): "error", (lost[1], 0): "error", (lost[1], 1): "error",
        }  # fmt: skip
        assert session.token_ids == before and session.num_turns == 1
        again = engine.add([3], GREEDY, session=session)
        assert again == lost[0]
        later = Consumer()
        later.until(engine, 1)
        return (*before, 3), list(later.results[again, 0].token_ids)

    for grid in GRIDS[:2]:
        for prompt, tokens in on_ranks(grid, body):
            assert tokens == alone(prompt, GREEDY)[0]


@pytest.mark.parametrize(
    ("way", "is_idle"),
    [
        ("error", True),
        ("error", False),
        ("sleep", True),
        ("sleep", False),
        ("weights", True),
        ("weights", False),
        ("generate", True),
    ],
)
def test_a_rank_that_does_something_else_ends_all_steps_on_every_rank(way: str, is_idle: bool) -> None:
    def body(engine: Engine, rank: int) -> str:
        engine.step()
        if not is_idle:
            engine.add(PROMPTS[1], SamplingParams(max_new_tokens=50, ignore_eos=True))
            engine.step()
        if rank == 1:
            if way == "error":
                raise ValueError("a tool broke")
            with pytest.raises(RanksDifferError):
                {"sleep": engine.sleep, "weights": engine.weights_changed, "generate": lambda: engine.generate([1])}[
                    way
                ]()
            return "other"
        with pytest.raises(RanksDifferError) as caught:
            for _ in range(60):
                engine.step()
        return str(caught.value)

    if way == "error":
        with pytest.raises(ValueError, match="a tool broke"):
            on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    else:
        assert "rank" in on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)[0]


def test_other_threads_may_add_and_abort_while_this_one_steps() -> None:
    def body(engine: Engine, rank: int) -> None:
        consumer, names = Consumer(), []
        is_over = threading.Event()

        def client() -> None:
            chance = random.Random(rank)
            for i in range(20):
                names.append(engine.add(chance.choice(PROMPTS), GREEDY, priority=i % 3))
                if i % 4 == 0:
                    engine.abort(names[-1])
            is_over.set()

        thread = threading.Thread(target=client)
        thread.start()

        def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
            consumer.take(outputs)
            return is_over.is_set() and len(consumer.reasons) == 20

        engine.run_until(condition)
        thread.join()
        for name in names:
            assert consumer.reasons[name, 0] in ("length", "stop", "abort")

    on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


def test_requests_of_lower_priority_numbers_run_first() -> None:
    def body(engine: Engine, rank: int) -> list[str]:
        names = [engine.add(prompt, GREEDY, priority=p) for prompt, p in zip(PROMPTS, (2, 0, 1, 0), strict=False)]
        ended: list[str] = []
        while len(ended) < len(names):
            ended += [names.index(o.request_id) for o in engine.step() if o.finish_reason]
        return ended

    assert on_ranks(RankGrid(), body, max_num_seqs=1)[0] == [1, 3, 2, 0]


def test_ids_that_are_not_given_are_of_no_other_request() -> None:
    def body(engine: Engine, rank: int) -> list[str]:
        names = [engine.add(PROMPTS[0]), engine.open_session(PROMPTS[0]).id]
        engine.weights_changed()
        return [*names, engine.add(PROMPTS[0])]

    found = [name for names in on_ranks(RankGrid(pcp_size=2, dcp_size=2), body) for name in names]
    assert len(set(found)) == 6


def test_a_stream_that_is_left_alone_takes_what_was_added_with_it_and_says_so() -> None:
    def body(engine: Engine, rank: int) -> None:
        name = engine.add(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True))
        engine.step()
        stream = engine.stream(PROMPTS[:2], [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 40)])
        next(stream)
        with pytest.raises(StreamEndedError):
            if rank == 1:
                stream.close()
                engine.step()
            else:
                list(stream)
        consumer = Consumer()
        consumer.until(engine, 1)
        assert consumer.reasons[name, 0] == "error"

    on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


def check_empty(engine: Engine) -> None:
    """Nothing is left of any request or session, here or in any home."""
    opened = engine._open
    left = (opened._batches, opened._batch_of, opened._last_turns, opened._ended, opened._own, opened._numbers_of)
    assert engine._core.is_idle and not any(left) and not opened._outbox and not opened._sessions
    engine._core.scheduler.check_integrity()
    for home in engine._core.homes:
        home.prefixes.evict(home.pool.num_blocks)
        assert home.pool.num_free == home.pool.num_blocks


def test_two_thousand_sessions_pass_through_a_small_pool_and_leave_nothing() -> None:
    turn = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
    num_sessions = 2000

    def body(engine: Engine, rank: int) -> tuple[int, int]:
        chance = random.Random(rank)
        sessions = [engine.open_session([chance.randrange(128) for _ in range(5)]) for _ in range(num_sessions // 2)]
        by_turn = {engine.add([], turn, session=session): session for session in sessions}
        num_turns = 0

        def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
            nonlocal num_turns
            for output in outputs:
                if output.finish_reason is not None:
                    num_turns += 1
                    session = by_turn.pop(output.request_id)
                    if session.num_turns < 3:
                        by_turn[engine.add([chance.randrange(128)], turn, session=session)] = session
                    else:
                        engine.close_session(session)
            return not by_turn

        engine.run_until(condition)
        engine.step()
        assert all(len(session.token_ids) == 5 + 2 + 3 + 3 for session in sessions)
        check_empty(engine)
        return num_turns, engine._core.scheduler.stats.num_cached_prefill_tokens

    small = {"kv_cache_gib": 2**-11, "max_num_batched_tokens": 512, "max_num_seqs": 128}
    for num_turns, num_cached in on_ranks(RankGrid(pcp_size=2, dcp_size=2), body, **small):
        assert num_turns == 3 * num_sessions // 2 and num_cached > 0


def test_a_storm_of_aborts_leaves_nothing() -> None:
    long = SamplingParams(max_new_tokens=30, ignore_eos=True)

    def body(engine: Engine, rank: int) -> dict[str, str]:
        chance, consumer = random.Random(rank), Consumer()
        open_names = [engine.add(chance.choice(PROMPTS), long, priority=i % 2) for i in range(300)]
        sessions = [engine.open_session(chance.choice(PROMPTS)) for _ in range(20)]
        open_names += [engine.add([], long, session=session) for session in sessions]

        def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
            consumer.take(outputs)
            for _ in range(min(len(open_names), chance.choice((0, 1, 40)))):
                engine.abort(open_names.pop(chance.randrange(len(open_names))))
            return len(consumer.reasons) == 320

        engine.run_until(condition)
        for session in sessions:
            engine.close_session(session)
        engine.step()
        check_empty(engine)
        return {name: reason for (name, _), reason in consumer.reasons.items()}

    for reasons in on_ranks(RankGrid(pcp_size=2, dcp_size=2), body, kv_cache_gib=2**-12, max_num_seqs=16):
        assert {*reasons.values()} == {"abort", "length"} or {*reasons.values()} == {"abort"}


def test_two_calls_share_no_random_numbers_and_one_that_fails_counts_on_no_rank() -> None:
    sampling = SamplingParams(max_new_tokens=8, seed=3)

    def body(engine: Engine, rank: int) -> list[tuple[int, ...]]:
        drawn = [engine.generate([PROMPTS[0]], sampling)[0].token_ids]
        with pytest.raises(UserError):
            engine.generate([[500]] if rank == 1 else [[1]], sampling)
        return [*drawn, engine.generate([PROMPTS[0]], sampling)[0].token_ids]

    first, second = on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    assert first == second and len(set(first)) == 2


def busy(engine: Engine, consumer: Consumer, num_steps: int = 2) -> str:
    """A request under way on this rank."""
    name = engine.add(PROMPTS[1], SamplingParams(max_new_tokens=50, ignore_eos=True))
    for _ in range(num_steps):
        consumer.take(engine.step())
    return name


CALLS: dict[str, Callable[[Engine], Any]] = {
    "generate": lambda engine: engine.generate([1], GREEDY),
    "stream": lambda engine: next(engine.stream([1])),
    "score": lambda engine: engine.score([([1], [2])]),
    "pooled": lambda engine: engine.generate_pooled([[1]], GREEDY),
    "wake": lambda engine: engine.wake(),
    "sleep": lambda engine: engine.sleep(),
    "weights": lambda engine: engine.weights_changed(),
    "close": lambda engine: engine.close(),
}


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("call", CALLS)
def test_another_call_on_one_rank_while_others_step_is_an_error_by_name_on_all(call: str, num_steps: int) -> None:
    """Behind a step that only prefilled, or ones that sampled; and afterwards all may go on together."""

    def body(engine: Engine, rank: int) -> str:
        busy(engine, Consumer(), num_steps)
        if rank == 1 and call == "close":
            engine.close()
            return "closed"
        with pytest.raises(StreamEndedError) as caught:
            CALLS[call](engine) if rank == 1 else [engine.step() for _ in range(60)]
        if call != "close":
            assert engine.generate([PROMPTS[0]], GREEDY)[0].finish_reason
        return str(caught.value)

    told = on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    assert "rank(s) [1]" in told[0]


def test_the_same_calls_of_all_ranks_may_be_made_while_requests_are_under_way() -> None:
    def body(engine: Engine, rank: int) -> tuple[int, ...]:
        consumer = Consumer()
        name = busy(engine, consumer)
        for call in ("generate", "score", "pooled", "wake", "weights", "sleep", "wake"):
            CALLS[call](engine)
            if engine.is_awake:
                consumer.take(engine.step())
        consumer.until(engine, 1)
        result = consumer.results[name, 0]
        assert len(result.token_ids) == 50 and result.weights_versions is not None
        assert [version for version, _ in result.weights_versions] == [0, 1], "sleep changes no weights"
        return result.token_ids

    on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


@pytest.mark.parametrize("first", ["prefill", "news", "nothing"])
def test_a_rank_that_leaves_a_stream_behind_any_step_ends_it_on_all(first: str) -> None:
    def body(engine: Engine, rank: int) -> None:
        engine.step()
        if first != "nothing":
            engine.add(PROMPTS[1], GREEDY)
            engine.step()
        if first == "news":
            engine.add(PROMPTS[0], GREEDY)
            engine.step()
        stream = engine.stream(PROMPTS[:2], [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 40)])
        next(stream)
        if rank == 1:
            stream.close()
            with pytest.raises(StreamEndedError):
                engine.step()
        else:
            with pytest.raises(StreamEndedError):
                list(stream)

    on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


def test_an_error_of_one_rank_alone_leaves_all_in_the_same_state() -> None:
    def body(engine: Engine, rank: int) -> None:
        engine.step()
        head = engine._runner._model.get_output_embeddings()
        if rank == 1:
            head.half()
        with pytest.raises((cpinfer.ModelChangedError, RanksDifferError)):
            engine.step()
        head.float()
        engine.weights_changed()
        engine.step()
        assert engine.weights_version == 1

    on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


def test_a_text_that_cannot_be_read_is_an_error_of_its_rank_and_nothing_is_stuck() -> None:
    class Unreadable:
        def decode(self, token_ids: Any, **_: Any) -> str:
            raise ValueError("no such token")

    with cpinfer.attach(make_model(FAMILIES["qwen2"]), dtype="float32", kv_cache_gib=2**-8) as engine:
        engine._open._stop_checker._tokenizer = Unreadable()
        session = engine.open_session(PROMPTS[0])
        engine.add([], GREEDY, session=session)
        with pytest.raises(ValueError, match="no such token"):
            while True:
                engine.step()
        engine._open._stop_checker._tokenizer = None
        assert session.turn is None and session.num_turns == 1
        engine.close_session(session)
        engine.step()
        check_empty(engine)


def test_arrivals_that_were_being_taken_in_when_an_interrupt_came_are_told_as_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with cpinfer.attach(make_model(FAMILIES["qwen2"]), dtype="float32", kv_cache_gib=2**-8) as engine:
        session = engine.open_session(PROMPTS[0])
        names = [engine.add(PROMPTS[1], GREEDY), engine.add([], GREEDY, session=session)]

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine._core, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        consumer = Consumer()
        consumer.until(engine, 2)
        assert consumer.reasons == {(name, 0): "error" for name in names}
        assert session.turn is None
        engine.close_session(session)
        engine.step()
        check_empty(engine)


@pytest.mark.parametrize("only_whole", [False, True])
def test_a_sample_that_is_wanted_whole_has_one_output_and_an_abort_or_a_turn_likewise(only_whole: bool) -> None:
    def body(engine: Engine, rank: int) -> Any:
        name = engine.add(PROMPTS[rank], replace(GREEDY, n=2), only_whole=only_whole)
        gone = engine.add(PROMPTS[2 + rank], replace(GREEDY, max_new_tokens=500), only_whole=only_whole)
        session = engine.open_session(PROMPTS[4 + rank])
        engine.add([], GREEDY, session=session, only_whole=only_whole)
        outputs: list[cpinfer.RequestOutput] = []

        def has_all(new: list[cpinfer.RequestOutput]) -> bool:
            outputs.extend(new)
            if sum(output.finish_reason == "length" for output in outputs) == 3:
                engine.abort(gone)
            return sum(output.finish_reason is not None for output in outputs) == 4

        engine.run_until(has_all)
        told = Consumer()
        told.take(outputs)  # which checks that they are the results in pieces
        assert told.reasons.pop((gone, 0)) == "abort" and set(told.reasons.values()) == {"length"}
        assert len(session.token_ids) == len(PROMPTS[4 + rank]) + 6
        return len(outputs), [told.tokens[name, sample] for sample in range(2)]

    found = on_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    for rank, (num_outputs, tokens) in enumerate(found):
        assert (num_outputs == 4) if only_whole else (num_outputs > 18)
        assert tokens == alone(PROMPTS[rank], replace(GREEDY, n=2))


def test_time_to_the_first_token_counts_from_when_a_request_is_added() -> None:
    with cpinfer.attach(make_model(FAMILIES["qwen2"]), dtype="float32", kv_cache_gib=2**-8) as engine:
        name, consumer = engine.add(PROMPTS[0], GREEDY), Consumer()
        time.sleep(0.2)
        consumer.until(engine, 1)
        assert consumer.results[name, 0].ttft_s >= 0.2


def test_local_calls_do_not_take_the_error_of_the_one_that_steps() -> None:
    with cpinfer.attach(make_model(FAMILIES["qwen2"]), dtype="float32", kv_cache_gib=2**-8) as engine:
        engine._core.left_alone = StreamEndedError("left", (1,))
        engine.abort(engine.add([1], GREEDY))
        engine.close_session(engine.open_session([1]))
        with pytest.raises(StreamEndedError, match="left"):
            engine.step()
