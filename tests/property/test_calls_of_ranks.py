"""Whatever calls two ranks make, both get the same results or an error each: no hang, no text that only one has."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.errors import PeerLostError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

CONFIG = parse_config(
    {
        "dtype": "float32",
        "prefill_context_parallel_size": 2,
        "decode_context_parallel_size": 2,
        "kv_cache_gib": 2**-10,
        "block_size": 4,
        "max_num_batched_tokens": 24,
    }
)
PROMPTS = [list(tokens) for tokens in prompts_of((5, 40, 9, 17), vocab_size=128)]
MODEL = make_model(FAMILIES["qwen2"])


class Op(NamedTuple):
    """One call of an engine; a stream is left after `taken` results."""

    kind: str
    prompts: list[int]
    sampling: SamplingParams
    taken: int


OPS = st.builds(
    Op,
    st.sampled_from(["generate", "stream", "stream", "score", "pooled", "nap", "weights"]),
    st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=4, unique=True),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0, 1.0]),
        max_new_tokens=st.integers(1, 6),
        n=st.integers(1, 2),
        seed=st.integers(0, 1),
    ),
    st.integers(1, 4),
)
MEETING = Op("generate", [0, 1, 2, 3], SamplingParams(temperature=0, max_new_tokens=3), 0)


def perform(engine: cpinfer.Engine, op: Op) -> Any:
    prompts = [PROMPTS[i] for i in op.prompts]
    match op.kind:
        case "generate":
            return [r.token_ids for r in engine.generate(prompts, op.sampling)]
        case "stream":
            taken = []
            for result in engine.stream(prompts, op.sampling):
                taken.append(result.token_ids)
                if len(taken) == op.taken:
                    break
            return taken
        case "score":
            return [s.logprobs for s in engine.score([(prompt, prompt[:3]) for prompt in prompts])]
        case "pooled":
            engine.generate_pooled(prompts, op.sampling)  # each rank has samples of its own
        case "nap":
            engine.sleep()
            engine.wake()
        case "weights":
            engine.weights_changed()
    return None


def outcomes_of(scripts: list[list[Op]]) -> list[tuple[list[Any], Exception | None]]:
    def body(topology: cpinfer.Topology) -> tuple[list[Any], Exception | None]:
        results: list[Any] = []
        try:
            with cpinfer.attach(copy.deepcopy(MODEL), topology, CONFIG) as engine:
                for op in (*scripts[topology.rank], MEETING):
                    results.append(perform(engine, op))
        except Exception as error:
            return results, error
        return results, None

    return run_ranks(RankGrid(pcp_size=2, dcp_size=2), body, timeout_s=20)


def check(script: list[Op], at: int, other: Op) -> None:
    scripts = [script, [*script[:at], other, *script[at + 1 :]]]
    (first, error), (second, other_error) = outcomes_of(scripts)
    assert (error is None) == (other_error is None), (error, other_error)
    assert not isinstance(error, PeerLostError) and not isinstance(other_error, PeerLostError), (error, other_error)
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        # Where one rank left a stream behind its last result, the other may have gone on to find that it was the last.
        assert place == at or a == b


CASES = given(
    st.lists(OPS, min_size=1, max_size=4).flatmap(
        lambda script: st.tuples(st.just(script), st.integers(0, len(script) - 1), OPS)
    )
)
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@CASES
def test_ranks_with_another_call_get_equal_results_or_an_error_each(case: tuple[list[Op], int, Op]) -> None:
    check(*case)


@QUICK
@given(st.lists(OPS, min_size=1, max_size=4))
def test_ranks_with_the_same_calls_get_equal_results(script: list[Op]) -> None:
    (first, error), (second, other_error) = outcomes_of([script, script])
    assert error is None and other_error is None, (error, other_error)
    assert first == second


@QUICK
@given(st.lists(OPS, min_size=1, max_size=3), st.integers(1, 4))
def test_a_stream_left_elsewhere_is_an_error_each_or_none(script: list[Op], taken: int) -> None:
    streams = [op._replace(kind="stream") for op in script]
    check(streams, len(streams) - 1, streams[-1]._replace(taken=taken))


@pytest.mark.slow
@pytest.mark.timeout(600)
@LONG
@CASES
def test_many_ranks_with_another_call(case: tuple[list[Op], int, Op]) -> None:
    check(*case)
