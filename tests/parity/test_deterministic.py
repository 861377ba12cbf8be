"""The deterministic mode: the same bits of every logprob of the vocabulary, whatever the layout, batch, chunk or cache.

Results are compared with `==` on floats. `top_logprobs` asks for all tokens there are, so nothing of a row goes unseen.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import cpinfer
import cpinfer.attention.exchanges.ordered as ordered
from covering import pairs
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from every_family import OFTEN, WITH_STATES
from tiny_models import FAMILIES, make_model, prompts_of

VOCAB = 128
PROMPTS = [
    {"prompt_token_ids": tokens, "id": f"prompt {i}"}
    for i, tokens in enumerate(prompts_of((5, 40, 17, 133, 8, 211, 30), vocab_size=VOCAB))
]
SAMPLING = SamplingParams(temperature=0.8, seed=5, n=2, max_new_tokens=7, top_logprobs=VOCAB)
CONFIG: dict[str, Any] = {"kv_cache_gib": 2**-7, "max_num_batched_tokens": 64, "block_size": 4, "deterministic": True}
ONE = RankGrid()
DTYPES = ["float32", "bfloat16"]
# Fast tests take two that others leave out: windows and steps come to their attention by another way.
SAMPLED = [
    family if family in (*OFTEN, "phimoe", "stablelm") else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
    if family not in WITH_STATES
]
# Another way to compute the same: grid, and keys of the config.
WAYS: dict[str, tuple[RankGrid, dict[str, Any]]] = {
    "pcp2 dcp2, odd chunks": (RankGrid(pcp_size=2, dcp_size=2), {"max_num_batched_tokens": 17}),
    "pcp2 dcp1": (RankGrid(pcp_size=2, dcp_size=1), {}),
    "pcp4 dcp4": (RankGrid(pcp_size=4, dcp_size=4), {}),
    "pcp4 dcp2, two homes": (RankGrid(pcp_size=4, dcp_size=2), {"max_num_batched_tokens": 100}),
    "pcp8 dcp8": (RankGrid(pcp_size=8, dcp_size=8), {}),
    "whole prompts": (ONE, {"max_num_batched_tokens": 4096}),
    "chunks of 16": (ONE, {"max_num_batched_tokens": 16}),
    "context of a prompt at a time": (RankGrid(pcp_size=2, dcp_size=2), {"context_workspace_tokens": 1}),
    "one at a time": (ONE, {"max_num_seqs": 1}),
    "no prefix cache": (ONE, {"enable_prefix_caching": False}),
}

pytestmark = pytest.mark.timeout(240)


def outcomes(results: Sequence[Any]) -> list[Any]:
    """All that may not depend on how it was computed."""
    return [(r.id, r.sample_index, r.token_ids, r.logprobs, r.processed_logprobs, r.top_logprobs) for r in results]


def run(
    model: Any, grid: RankGrid = ONE, prompts: Any = PROMPTS, sampling: SamplingParams = SAMPLING, **config: Any
) -> list[Any]:
    def body(topology: cpinfer.Topology) -> list[Any]:
        with cpinfer.attach(copy.deepcopy(model), topology, parse_config({**CONFIG, **config})) as engine:
            return outcomes(engine.generate(prompts, sampling))

    found: list[Any] = run_ranks(grid, body)[0]
    return found


def model_of(family: str, dtype: str) -> Any:
    return make_model(FAMILIES[family]).to(getattr(torch, dtype))


@pytest.mark.parametrize(("family", "dtype"), pairs(SAMPLED, DTYPES))
def test_every_family_has_the_same_bits_in_another_layout(family: str, dtype: str) -> None:
    model = model_of(family, dtype)
    expected = run(model)
    for way in ("pcp2 dcp2, odd chunks", "pcp4 dcp2, two homes"):
        grid, config = WAYS[way]
        assert run(model, grid, **config) == expected, way


@functools.lru_cache(maxsize=2)
def expected_of(family: str, dtype: str) -> list[Any]:
    """What one process answers."""
    return run(model_of(family, dtype))


def dealt(family: str, dtypes: Sequence[str]) -> list[Any]:
    """All ways of a family, each fast in one dtype."""
    return [pytest.param(family, *pair.values, marks=pair.marks) for pair in pairs(list(WAYS), dtypes)]


@pytest.mark.parametrize(
    ("family", "way", "dtype"),
    [
        # Between them every way in each.
        *dealt("qwen2", DTYPES),
        *dealt("gpt_oss", DTYPES[::-1]),
        *(
            pytest.param(family, way, dtype, marks=pytest.mark.slow)
            for family in FAMILIES
            if family not in (*WITH_STATES, "qwen2", "gpt_oss")
            for dtype in DTYPES
            for way in WAYS
        ),
    ],
)
def test_every_way_has_the_same_bits(family: str, way: str, dtype: str) -> None:
    grid, config = WAYS[way]
    assert run(model_of(family, dtype), grid, **config) == expected_of(family, dtype)


@functools.lru_cache(maxsize=2)
def expected_of_a_rounded_cache(cache: str) -> list[Any]:
    return run(model_of("qwen2", "bfloat16"), kv_cache_dtype=cache)


@pytest.mark.parametrize(("way", "cache"), pairs(list(WAYS), ["fp8_e4m3", "fp8_e5m2"]))
def test_a_rounded_cache_has_the_same_bits(cache: str, way: str) -> None:
    expected = expected_of_a_rounded_cache(cache)
    assert expected != expected_of("qwen2", "bfloat16"), "it rounds"
    grid, config = WAYS[way]
    assert run(model_of("qwen2", "bfloat16"), grid, kv_cache_dtype=cache, **config) == expected


@pytest.mark.parametrize("interleave", [1, 3, 64])
def test_tokens_may_be_dealt_in_any_way_that_layouts_share(interleave: int) -> None:
    model = model_of("gemma2", "float32")
    expected = run(model, cp_kv_cache_interleave_size=interleave)
    for way in ("pcp2 dcp2, odd chunks", "pcp8 dcp8"):
        grid, config = WAYS[way]
        assert run(model, grid, cp_kv_cache_interleave_size=interleave, **config) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_cached_preempted_or_asked_again_has_the_same_bits(dtype: str) -> None:
    model = model_of("qwen2", dtype)
    expected = run(model)
    answer_of = {(name, sample): (tokens, *rest) for name, sample, tokens, *rest in expected}

    def attached(topology: cpinfer.Topology, **config: Any) -> Any:
        return cpinfer.attach(copy.deepcopy(model), topology, parse_config({**CONFIG, **config}))

    def body(topology: cpinfer.Topology) -> None:
        # A pool that preempts: it holds the longest prompt, and little beside it.
        with attached(topology, kv_cache_gib=2**-13 if dtype == "float32" else 2**-14) as engine:
            assert outcomes(engine.generate(PROMPTS, SAMPLING)) == expected
            assert engine.stats.num_preemptions > 0
        with attached(topology) as engine:
            # One call for each prompt; then all again, found in the cache.
            by_one = [result for prompt in PROMPTS for result in engine.generate(prompt, SAMPLING)]
            assert outcomes(by_one) == expected
            before = engine.stats.num_cached_prefill_tokens
            again = outcomes(engine.generate(PROMPTS, SAMPLING))
            assert engine.stats.num_cached_prefill_tokens > before
            # What is cached has no logprobs of its own to be compared by, but what follows it.
            assert again == expected
            # The second half of an answer as the turn of a session, on KV that is there; the first as its prompt.
            greedy = replace(SAMPLING, temperature=0.0, n=1, max_new_tokens=8)
            whole = engine.generate(PROMPTS[3], greedy)[0]
            session = engine.open_session(PROMPTS[3]["prompt_token_ids"])
            for first, last in ((0, 3), (3, 8)):
                engine.add([], replace(greedy, max_new_tokens=last - first), session=session)
                done: list[Any] = []

                def ended(outputs: list[Any], done: list[Any] = done) -> bool:
                    done += [output.result for output in outputs if output.result is not None]
                    return bool(done) or topology.rank > 0

                engine.run_until(ended)
                if topology.rank == 0:
                    assert done[0].top_logprobs == whole.top_logprobs[first:last]

    run_ranks(RankGrid(), body)
    assert len(answer_of) == 2 * len(PROMPTS)


class TestControls:
    """Each of these would go unseen if the comparisons above could not fail."""

    def test_without_the_mode_bits_differ(self) -> None:
        for dtype in DTYPES:
            model = model_of("qwen2", dtype)
            grid, config = WAYS["pcp2 dcp2, odd chunks"]
            plain = run(model, deterministic=False)
            assert run(model, grid, deterministic=False, **config) != plain

    def test_rows_that_depend_on_their_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of("qwen2", "float32")
        expected = run(model)
        monkeypatch.setattr("cpinfer.engine.attach.invariant_rows", nullcontext)
        monkeypatch.setattr("cpinfer.engine.deterministic.check_row_invariance", lambda *_, **__: None)
        assert run(model, max_num_seqs=1) != expected

    def test_another_order_of_virtual_shards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of("qwen2", "float32")
        expected, merge = run(model), ordered.merge_ordered
        monkeypatch.setattr(ordered, "merge_ordered", lambda outs, lses: merge(outs.flip(0), lses.flip(0)))
        assert run(model, *WAYS["pcp2 dcp2, odd chunks"][:1]) != expected

    def test_another_number_of_virtual_shards(self) -> None:
        model = model_of("qwen2", "float32")
        assert run(model, deterministic_kv_shards=4) != run(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"deterministic_kv_shards": 3}, r"dcp=2 does not divide deterministic_kv_shards=3\. Set it"),
        ({"decode_exchange": "ag_rs"}, '"decode_exchange" is "ag_rs"; it must be "a2a" with "deterministic"'),
        ({"cascade_attention": "on"}, '"cascade_attention" is "on"; it must be "auto" or "off" with "deterministic"'),
        ({"context_exchange": "queries"}, '"context_exchange" is "queries"; it must be "auto" or "kv"'),
        ({"cp_wire_dtype": "bfloat16"}, '"cp_wire_dtype" is "bfloat16"; it must be "auto" or "float32"'),
        ({"backend": "flashinfer"}, '"backend" is "flashinfer"; it must be "auto" or "cpu" or "torch"'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_kept_is_refused_before_anything_runs(config: dict[str, Any], words: str) -> None:
    model = model_of("qwen2", "float32")

    def body(topology: cpinfer.Topology) -> None:
        with (
            pytest.raises(UserError, match=words),
            cpinfer.attach(copy.deepcopy(model), topology, {**CONFIG, **config}),
        ):
            raise AssertionError("it was not refused")

    run_ranks(RankGrid(pcp_size=2, dcp_size=2), body)


def test_no_other_kernels_are_made_and_the_log_names_those_that_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_wanted(*_: Any) -> None:
        raise AssertionError("these kernels never run")

    monkeypatch.setattr("cpinfer.engine.needs.make_backend", none_wanted)
    with caplog.at_level("INFO", "cpinfer"), cpinfer.attach(model_of("qwen2", "float32"), config=CONFIG) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
    said = (
        "attention by ordered (deterministic, 8 virtual KV shards, device cpu), cascade_attention off, CUDA graphs off"
    )
    assert said in caplog.text
