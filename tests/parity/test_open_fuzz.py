"""Random programs on an open engine: whatever ranks do, each answer is that of its sequence and its weights alone.

All ranks of a program make the same calls in the same order (steps, streams, calls, naps, new weights); between them
each adds, aborts, opens and closes what its own chance tells it. Afterwards every answer is asked for again, alone and
span by span, under the weights that made it.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from test_engine_parity import grid_name
from test_open_engine import CONFIG, Consumer, check_empty

import cpinfer
from covering import pairs
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.engine import Engine
from cpinfer.engine.random_numbers import exponentials
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.draws import GROUP_SIZE
from tiny_models import FAMILIES, make_model

VOCAB, NEAR = 128, 1e-5
GRIDS = [RankGrid(), RankGrid(pcp_size=2, dcp_size=2), RankGrid(pcp_size=2, dcp_size=1)]
FEW = range(3)
MANY = range(3, 40)


class Program:
    """One rank's part in a program. `shared` is the same chance on every rank, `own` is this one's."""

    def __init__(self, engine: Engine, rank: int, seed: int) -> None:
        self.engine = engine
        self.shared, self.own = random.Random(seed), random.Random(f"{seed}/{rank}")
        self.consumer, self.num_asked = Consumer(), 0
        self.sessions: list[cpinfer.Session] = []
        self.names: list[str] = []
        self.sampling_of: dict[str, SamplingParams] = {}
        self.called: list[tuple[cpinfer.RolloutResult, SamplingParams]] = []
        self.head = engine._runner._model.get_output_embeddings().weight

    def prompt(self) -> list[int]:
        shared = [7] * self.own.choice((0, 9, 30))  # so that prompts begin alike
        return shared + [self.own.randrange(128) for _ in range(self.own.randrange(1, 25))]

    def sampling(self, n: int = 1) -> SamplingParams:
        temperature = self.own.choice((0.0, 1.0))
        return SamplingParams(temperature=temperature, max_new_tokens=self.own.randrange(1, 12), seed=4, n=n)

    def do_something_of_its_own(self) -> None:
        engine, own = self.engine, self.own
        idle = [s for s in self.sessions if s.turn is None]
        choice = own.randrange(8)
        if choice < 2:
            self.add(self.prompt(), self.sampling(n=own.choice((1, 1, 3))))
        elif choice == 2:
            self.sessions.append(engine.open_session(self.prompt()))
        elif choice < 6 and idle:
            new = [own.randrange(128) for _ in range(own.choice((0, 1, 13)))]
            self.add(new, self.sampling(), session=own.choice(idle))
        elif choice == 6 and self.names:
            engine.abort(own.choice(self.names))
        elif choice == 7 and len(self.sessions) > 2:
            engine.close_session(self.sessions.pop(own.randrange(len(self.sessions))))

    def add(self, prompt: Any, sampling: SamplingParams, **keys: Any) -> None:
        name = self.engine.add(prompt, sampling, priority=self.own.choice((0, 0, 1)), **keys)
        self.names.append(name)
        self.sampling_of[name] = sampling
        self.num_asked += sampling.n

    def step(self) -> None:
        for _ in range(self.own.randrange(3)):
            self.do_something_of_its_own()
        self.consumer.take(self.engine.step())

    def run(self) -> None:
        engine, shared = self.engine, self.shared
        actions: list[Callable[[], None]] = [self.call, self.leave_a_stream, self.nap, self.change_weights]
        for _ in range(12):
            for _ in range(shared.randrange(1, 8)):
                self.step()
            shared.choice(actions)()
        self.consumer.until(engine, self.num_asked)
        for session in self.sessions:
            engine.close_session(session)
        engine.step()
        check_empty(engine)

    def call(self) -> None:
        prompts = [{"prompt_token_ids": [self.shared.randrange(128)] * 5, "id": self.shared.random().hex()}]
        sampling = SamplingParams(max_new_tokens=6, seed=1)
        self.called += [(result, sampling) for result in self.engine.generate(prompts, sampling)]

    def leave_a_stream(self) -> None:
        for _ in self.engine.stream([[1, 2, 3], [4] * 30], [SamplingParams(max_new_tokens=n) for n in (2, 9)]):
            break

    def nap(self) -> None:
        self.engine.sleep()
        self.engine.wake()

    def change_weights(self) -> None:
        self.head.data.copy_(self.head.data.roll(1, dims=0))  # another token for every one
        self.engine.weights_changed()

    def check(self, engine: Engine) -> None:
        """Every span of every answer, asked of an engine on the first weights, changed as ours were."""
        head = engine._runner._model.get_output_embeddings().weight
        spans: dict[int, list[tuple[dict[str, Any], SamplingParams, tuple[int, ...]]]] = {}
        for (name, sample), result in self.consumer.results.items():
            sampling, start = self.sampling_of[name], 0
            for version, length in result.weights_versions or ((result.weights_version, len(result.token_ids)),):
                tokens = result.token_ids[start : start + length]
                if tokens and (
                    start == 0 or sampling.temperature == 0
                ):  # later draws are of another place in an answer
                    before = (*result.prompt_token_ids, *result.token_ids[:start])
                    given = {"prompt_token_ids": before, "id": name}
                    asked = cpinfer.SamplingParams(**{**vars_of(sampling), "max_new_tokens": length, "n": sample + 1})
                    spans.setdefault(version, []).append((given, asked, tokens))
                start += length
            assert start == len(result.token_ids)
        for version in range(self.engine.weights_version + 1):
            for given, asked, tokens in spans.get(version, ()):
                found = engine.generate(given, asked)[-1].token_ids
                assert found == tokens or is_tie(engine, given, asked, tokens, found), (version, given, asked)
            head.data.copy_(head.data.roll(1, dims=0))
            engine.weights_changed()


def is_tie(
    engine: Engine, given: dict[str, Any], asked: SamplingParams, tokens: tuple[int, ...], found: tuple[int, ...]
) -> bool:
    """Whether the first tokens that differ lie so near each other that the last bits of float32 decide."""
    at = next(i for i, (one, other) in enumerate(zip(tokens, found, strict=True)) if one != other)
    before = {"prompt_token_ids": (*given["prompt_token_ids"], *tokens[:at]), "id": "of a tie"}
    (result,) = engine.generate(before, SamplingParams(temperature=0, max_new_tokens=1, top_logprobs=VOCAB))
    assert result.top_logprobs is not None
    logprobs = [logprob for _, logprob in sorted(result.top_logprobs[0])]
    low, high = sorted((tokens[at], found[at]))
    if asked.temperature == 0:
        return abs(logprobs[low] - logprobs[high]) < NEAR
    drawn = SampledRequest(Prompt(0, given["id"], (0,)), asked.n - 1, asked, asked.max_new_tokens)
    drawn.sampled = [SampledToken(token, 0.0, 0.0) for token in tokens[:at]]
    assert VOCAB <= GROUP_SIZE, "one race; times of groups would have to be compared too"
    times = [exponentials([drawn], VOCAB)[0][token] / math.exp(logprobs[token]) for token in (low, high)]
    return abs(math.log(times[0] / times[1])) < NEAR


def vars_of(sampling: SamplingParams) -> dict[str, Any]:
    return {key: getattr(sampling, key) for key in ("temperature", "max_new_tokens", "seed", "n")}


def run(grid: RankGrid, seed: int) -> None:
    model = make_model(FAMILIES["qwen2"])
    pressure = random.Random(seed).choice(
        (
            {},
            {"kv_cache_gib": 2**-14},
            {"max_session_tokens": 30},
            {"max_num_seqs": 3},
            {"enable_prefix_caching": False},
        )
    )

    def attached(topology: cpinfer.Topology) -> Program:
        config = parse_config({**CONFIG, **pressure})
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            program = Program(engine, topology.rank, seed)
            program.run()
        return program

    programs = run_ranks(grid, attached)
    assert all(program.num_asked == len(program.consumer.reasons) for program in programs)
    assert all(
        [r.token_ids for r, _ in program.called] == [r.token_ids for r, _ in programs[0].called] for program in programs
    )
    # Alone, and by one rank: what is checked of it is nothing that it could have kept.
    for program in programs:
        with cpinfer.attach(copy.deepcopy(model), config=parse_config(CONFIG)) as engine:
            program.check(engine)


@pytest.mark.parametrize(("seed", "grid"), pairs(FEW, GRIDS, grid_name))
def test_every_answer_of_a_random_program_is_that_of_its_sequence_and_weights_alone(grid: RankGrid, seed: int) -> None:
    run(grid, seed)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("seed", MANY)
def test_so_are_those_of_many(grid: RankGrid, seed: int) -> None:
    run(grid, seed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_another_token_is_no_tie(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, max_new_tokens=6, seed=4)
    given = {"prompt_token_ids": (1, 2, 3), "id": "control"}
    with cpinfer.attach(make_model(FAMILIES["qwen2"]), config=parse_config(CONFIG)) as engine:
        tokens = engine.generate(given, sampling)[0].token_ids
        for at in range(len(tokens)):
            for step in (1, -1, 5):
                other = (*tokens[:at], (tokens[at] + step) % VOCAB, *tokens[at + 1 :])
                assert not is_tie(engine, given, sampling, tokens, other)
