"""A KV cache in fp8, under the whole engine: the answers of Transformers with K and V rounded alike, in every layout.

K and V that differ between layouts by the last bits of float32 can lie to both sides of a tie of fp8, and are then one
step of fp8 apart. That is rare, and one number of thousands: one answer of a few may differ by more than float32 does.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_family_parity import (
    CHUNKS,
    CONFIG,
    GREEDY,
    GRIDS,
    NUM_BLOCKS,
    PROMPTS,
    SLOW,
    TOLERANCE,
    each,
    grid_name,
    name,
    whole,
)
from thread_tp import on_ranks

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import EngineFaultError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from fake_flashinfer import VERSIONS
from tiny_models import prompts_of

DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
ONE, PCP2_DCP2, TP2_PCP2_DCP4 = GRIDS[0], GRIDS[2], GRIDS[5]
HOMES = RankGrid(pcp_size=4, dcp_size=2)
E4M3: dict[str, Any] = {"kv_cache_dtype": "fp8_e4m3"}
# What a tie may make of an answer, and what rounding otherwise makes of it at least.
OF_A_TIE, OF_ROUNDING = 50 * TOLERANCE, 1000 * TOLERANCE


@functools.cache
def greedy(family: str, prompt: tuple[int, ...], num_tokens: int, dtype: str) -> tuple[list[int], torch.Tensor]:
    """What the whole model continues a prompt with through a cache in `dtype`, and the logprobs of that."""
    model, kv_dtype = whole(family).model, DTYPES[dtype]
    tokens = check_rollout.generate_greedy(model, prompt, num_tokens, kv_dtype)
    return tokens, check_rollout.score(model, prompt, tokens, kv_dtype)


def assert_alike(family: str, results: Sequence[RolloutResult], dtype: str = "fp8_e4m3") -> None:
    """The same tokens, and the same logprobs, but for a tie in one answer."""
    differences = []
    for result in results:
        tokens, logprobs = greedy(family, tuple(result.prompt_token_ids), len(result.token_ids), dtype)
        assert list(result.token_ids) == tokens
        differences.append(float((logprobs - torch.tensor(result.logprobs)).abs().max()))
    *others, largest = sorted(differences, key=lambda d: (math.isnan(d), d))
    assert largest <= OF_A_TIE and all(d <= TOLERANCE for d in others), differences


def answers(family: str, grid: RankGrid, **config: Any) -> list[RolloutResult]:
    ranks = on_ranks(whole(family).model, grid, lambda engine: engine.generate(PROMPTS, GREEDY), **config)
    plain = [[(r.token_ids, r.logprobs) for r in results] for results in ranks]
    assert all(other == plain[0] for other in plain)
    return ranks[0]


@pytest.mark.parametrize(
    ("grid", "exchange"),
    [(ONE, "kv"), (PCP2_DCP2, "queries"), (TP2_PCP2_DCP4, "kv"), (HOMES, "queries")],
    ids=lambda x: grid_name(x) if isinstance(x, RankGrid) else x,
)
@pytest.mark.parametrize("family", ["qwen2", "mistral", "deepseek_v3"])  # full attention, windows, latents
def test_answers_in_chunks_equal_those_of_transformers_with_kv_rounded_alike(
    family: str, exchange: str, grid: RankGrid
) -> None:
    assert_alike(family, answers(family, grid, **CHUNKS, **E4M3, context_exchange=exchange))


@SLOW
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "grid"), each(*GRIDS, HOMES, RankGrid(pcp_size=2, dcp_size=1), often=()), ids=name)
def test_every_family_in_every_layout_equals_transformers_with_kv_rounded_alike(
    family: str, grid: RankGrid, dtype: str
) -> None:
    for way in (CONFIG, {**CHUNKS, "context_exchange": "queries"}, {**CHUNKS, "context_exchange": "kv"}):
        assert_alike(family, answers(family, grid, **way, kv_cache_dtype=dtype), dtype)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])  # soft caps, sinks
def test_e5m2_and_replicated_queries_are_as_exact(family: str) -> None:
    grid = RankGrid(tp_size=2, pcp_size=2, dcp_size=2)
    results = answers(family, grid, **CHUNKS, kv_cache_dtype="fp8_e5m2", decode_exchange="replicate_q")
    assert_alike(family, results, "fp8_e5m2")


@pytest.mark.parametrize("cascade", ["off", "on"])
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_what_is_reused_of_a_prefix_is_what_was_computed(family: str, cascade: str) -> None:
    """Found whole, in part behind another turn, and shared by samples of one prompt, whose blocks are copied."""

    def body(engine: cpinfer.Engine) -> tuple[list[RolloutResult], int]:
        [first] = engine.generate([PROMPTS[-1]], GREEDY)
        again = engine.generate([PROMPTS[-1]], GREEDY)
        num_cached = engine.stats.num_cached_prefill_tokens
        turn = engine.generate([[*PROMPTS[-1], *first.token_ids, 5, 6, 7]], dataclasses.replace(GREEDY, n=3))
        return [first, *again, *turn], min(num_cached, engine.stats.num_cached_prefill_tokens)

    config = {**CONFIG, **E4M3, "cascade_attention": cascade}
    results, num_cached = on_ranks(whole(family).model, PCP2_DCP2, body, **config)[0]
    assert num_cached >= 144 and len(results) == 5
    first, again, *turn = results
    assert first.logprobs == pytest.approx(again.logprobs, abs=OF_A_TIE)
    assert_alike(family, [again, *turn[:1]])
    assert [r.token_ids for r in turn[1:]] == [turn[0].token_ids] * 2


def test_a_tight_pool_preempts_and_changes_no_answer() -> None:
    spec = model_spec(whole("llama").model)
    per_token = spec.kv_layout(2).bytes_per_token(2, "float8_e4m3fn")
    tight = {**CONFIG, **E4M3, "kv_cache_gib": NUM_BLOCKS * 4 * per_token / 2**30}
    sampling = SamplingParams(temperature=0, max_new_tokens=24)

    def body(engine: cpinfer.Engine) -> tuple[list[RolloutResult], int]:
        assert engine.kv_capacity_tokens == NUM_BLOCKS * 4 * 2
        return engine.generate(prompts_of([9] * 6, vocab_size=128), sampling), engine.stats.num_preemptions

    results, num_preemptions = on_ranks(whole("llama").model, PCP2_DCP2, body, **tight)[0]
    assert num_preemptions > 0
    assert_alike("llama", results)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "deepseek_v3"])
def test_without_rounding_transformers_says_something_else(family: str) -> None:
    """The negative control: what is compared above depends on it, and on which fp8 it is."""
    results = answers(family, ONE, **CONFIG, **E4M3)
    model = whole(family).model
    for kv_dtype in (None, torch.float8_e5m2):
        differences = [
            (check_rollout.score(model, r.prompt_token_ids, r.token_ids, kv_dtype) - torch.tensor(r.logprobs)).abs()
            for r in results
        ]
        assert max(float(d.max()) for d in differences) > OF_ROUNDING


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pool_holds_as_many_more_tokens_as_their_bytes_are_fewer(dtype: str) -> None:
    model = copy.deepcopy(whole("llama").model).to(getattr(torch, dtype))
    capacity = {}
    for kept in ("auto", "fp8_e4m3"):
        config = parse_config({"dtype": dtype, "kv_cache_gib": 2**-10, "kv_cache_dtype": kept})
        with cpinfer.attach(model, config=config) as engine:
            capacity[kept] = engine.kv_capacity_tokens
            assert engine.kv_pool_bytes == 2**20
    assert capacity["fp8_e4m3"] == getattr(torch, dtype).itemsize * capacity["auto"]


# --- through the literal interpreter of FlashInfer's wrappers, which widen fp8 as its kernels do ---


@pytest.mark.parametrize(
    ("family", "dtype", "version", "grid"),
    [
        ("gemma2", "fp8_e4m3", VERSIONS[-1], PCP2_DCP2),
        ("deepseek_v3", "fp8_e4m3", VERSIONS[0], PCP2_DCP2),
        pytest.param("llama", "fp8_e5m2", VERSIONS[0], TP2_PCP2_DCP4, marks=SLOW),
        pytest.param("deepseek_v3", "fp8_e4m3", VERSIONS[-1], ONE, marks=SLOW),
    ],
    ids=lambda x: grid_name(x) if isinstance(x, RankGrid) else x,
)
def test_flashinfer_over_fp8_pages_gives_the_same_answers(
    on_flashinfer: Callable[[str], list[AttentionNeeds]], family: str, dtype: str, version: str, grid: RankGrid
) -> None:
    asked = on_flashinfer(version)
    config = {**CHUNKS, "kv_cache_dtype": dtype, "context_exchange": "queries"}
    few = SamplingParams(temperature=0, max_new_tokens=3)
    results = on_ranks(whole(family).model, grid, lambda engine: engine.generate(PROMPTS[:4], few), **config)[0]
    assert_checked_over(asked, dtype)
    assert_alike(family, results, dtype)


def assert_checked_over(asked: Sequence[AttentionNeeds], dtype: str) -> None:
    """What is not asked for is not checked at start."""
    assert {needs.cache_dtype for needs in asked} == {DTYPES[dtype]}


def overflowing(*, is_decode: bool) -> tuple[Any, list[float]]:
    """A model, and what its next key in the middle of a chunk, or of a decode step, will be."""
    model = copy.deepcopy(whole("llama").model)
    to_come: list[float] = []

    def overflow(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if to_come and is_decode == (output.shape[1] == 1):
            output[0, output.shape[1] // 2, 0] = to_come.pop()
        return output

    model.model.layers[0].self_attn.k_proj.register_forward_hook(overflow)
    return model, to_come


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_decode", [False, True], ids=["early chunk", "decode"])
@pytest.mark.parametrize("is_flashinfer", [False, True], ids=["torch", "flashinfer"])
def test_a_key_that_overflows_is_a_fault_and_leaves_nothing_behind(
    on_flashinfer: Callable[[str], list[AttentionNeeds]], is_flashinfer: bool, is_decode: bool, dtype: str
) -> None:
    """A chunk that samples nothing shows its fault when its keys are read; FlashInfer reads NaN as a number."""
    asked = on_flashinfer(VERSIONS[0]) if is_flashinfer else None
    model, to_come = overflowing(is_decode=is_decode)
    config = parse_config({"dtype": "float32", **CHUNKS, "kv_cache_dtype": dtype, "context_exchange": "queries"})
    few = dataclasses.replace(GREEDY, max_new_tokens=3)
    with cpinfer.attach(model, config=config) as engine:
        if asked is not None:
            assert_checked_over(asked, dtype)
        engine.generate([PROMPTS[3]], few)
        to_come.append(math.inf)
        with pytest.raises(EngineFaultError, match="not finite"):
            engine.generate([PROMPTS[-1]], dataclasses.replace(few, max_new_tokens=3 if is_decode else 1))
        assert engine._steps is not None
        cache = engine._steps._cache
        assert all(x.float().isfinite().all() for layer in range(2) for x in cache.read(layer))
        results = engine.generate([PROMPTS[3]], few)
        assert engine.stats.num_cached_prefill_tokens == 0
    assert_alike("llama", results, dtype)


def test_a_fault_of_weights_that_are_no_more_is_forgotten_with_them() -> None:
    """A stream that is closed before its fault has shown."""
    model, to_come = overflowing(is_decode=False)
    with cpinfer.attach(model, config=parse_config({"dtype": "float32", **CHUNKS, **E4M3})) as engine:
        to_come.append(math.inf)
        stream = engine.stream([PROMPTS[1], PROMPTS[-1]], dataclasses.replace(GREEDY, max_new_tokens=1))
        assert next(iter(stream)).prompt_index == 0 and not to_come
        stream.close()
        engine.weights_changed()
        results = engine.generate([PROMPTS[3]], GREEDY)
    assert_alike("llama", results)
