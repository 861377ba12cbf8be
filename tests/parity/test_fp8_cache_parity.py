"""A KV cache in fp8, under the whole engine: the answers of Transformers with K and V rounded alike, in every layout.

K and V that differ between layouts by the last bits of float32 can lie to both sides of a tie of fp8, and are then one
step of fp8 apart: one number of thousands, which moves an answer by more than float32 does. So an answer has to be that
of Transformers with ties of its own K and V rounded one way or the other, as near as float32 is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
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
from cpinfer.kv_cache import paged_kv_cache
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.float8 import rounded_through
from cpinfer_tools.verify import check_rollout
from fake_flashinfer import VERSIONS
from tiny_models import prompts_of

DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
ONE, TP2, PCP2_DCP2, TP2_PCP2_DCP4 = GRIDS[0], GRIDS[1], GRIDS[2], GRIDS[5]
HOMES = RankGrid(pcp_size=4, dcp_size=2)
E4M3: dict[str, Any] = {"kv_cache_dtype": "fp8_e4m3"}
# What rounding makes of an answer at least.
OF_ROUNDING = 1000 * TOLERANCE
# So near to a tie of fp8, of the largest number of its row, layouts may round a number to either side.
OF_A_TIE = 4e-6
# Of an answer's K and V so many at most lie so near and are rounded otherwise.
MAX_TIES = 2


@dataclasses.dataclass(frozen=True)
class Number:
    """One of K (0) or V (1) of a layer, counted through the whole tensor."""

    layer: int
    part: int
    index: int


class TiedCache(check_rollout.RoundedCache):
    """Rounds as the oracle does, but `turned` to the other side; `ties` are all that could be turned."""

    def __init__(self, config: Any, dtype: torch.dtype, turned: frozenset[Number]) -> None:
        super().__init__(config, dtype)
        self.turned = turned
        self.ties: list[Number] = []
        self._parts = itertools.count()

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        layer, part = divmod(next(self._parts), 2)
        nearest, reach = super()._rounded(x), OF_A_TIE * x.abs().amax(dim=-1, keepdim=True)
        below, above = super()._rounded(x - reach), super()._rounded(x + reach)
        numbers = [Number(layer, part, int(i)) for i in (below != above).flatten().nonzero()]
        self.ties += numbers
        flat = nearest.flatten()
        for number in self.turned.intersection(numbers):
            sides = below.flatten()[number.index], above.flatten()[number.index]
            flat[number.index] = sides[0] if flat[number.index] == sides[1] else sides[1]
        return flat.view_as(x)


@torch.no_grad()
def off_by(family: str, result: RolloutResult, dtype: str, turned: frozenset[Number]) -> tuple[float, list[Number]]:
    """The largest difference of an answer's logprobs from those of the whole model, and the ties of its K and V."""
    ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
    cache, num_new = TiedCache(whole(family).model.config, DTYPES[dtype], turned), len(result.token_ids)
    logits = whole(family).model(ids, use_cache=True, past_key_values=cache, logits_to_keep=num_new + 1).logits[0, :-1]
    logprobs = logits.log_softmax(dim=-1).gather(-1, ids[0, -num_new:, None]).squeeze(-1)
    return float((logprobs - torch.tensor(result.logprobs)).abs().max()), cache.ties


def least_off_by(family: str, result: RolloutResult, dtype: str) -> float:
    """The same, by that way to round ties which comes nearest."""
    least, ties = off_by(family, result, dtype, frozenset())
    for num in range(1, MAX_TIES + 1):
        for turned in itertools.combinations(ties, num):
            if least <= TOLERANCE:
                return least
            least = min(least, off_by(family, result, dtype, frozenset(turned))[0])
    return least


@functools.cache
def greedy(family: str, prompt: tuple[int, ...], num_tokens: int, dtype: str) -> tuple[list[int], torch.Tensor]:
    """What the whole model continues a prompt with through a cache in `dtype`, and the logprobs of that."""
    model, kv_dtype = whole(family).model, DTYPES[dtype]
    tokens = check_rollout.generate_greedy(model, prompt, num_tokens, kv_dtype)
    return tokens, check_rollout.score(model, prompt, tokens, kv_dtype)


def assert_alike(family: str, results: Sequence[RolloutResult], dtype: str = "fp8_e4m3") -> None:
    """The same tokens, and the same logprobs, whichever way ties are rounded."""
    for result in results:
        tokens, logprobs = greedy(family, tuple(result.prompt_token_ids), len(result.token_ids), dtype)
        assert list(result.token_ids) == tokens
        if not (logprobs - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE:
            assert least_off_by(family, result, dtype) <= TOLERANCE


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
    assert_alike(family, [first, again, *turn[:1]])
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


@SLOW
def test_where_an_answer_differs_one_tie_is_all_that_does() -> None:
    """The sums of two tp ranks put one number of K on the other side; no other number turned explains the answer."""
    result = answers("starcoder2", TP2, **CONFIG, **E4M3)[3]
    plain, ties = off_by("starcoder2", result, "fp8_e4m3", frozenset())
    turned = [off_by("starcoder2", result, "fp8_e4m3", frozenset([tie]))[0] for tie in ties]
    assert plain > 100 * TOLERANCE
    assert sorted(difference <= TOLERANCE for difference in turned) == [*[False] * (len(ties) - 1), True]


def test_a_number_of_each_token_that_is_a_step_off_and_no_tie_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = rounded_through(x, dtype)
        found[:, 0, 0] = rounded_through(1.13 * x[:, 0, 0], dtype)  # one step further on
        return found

    monkeypatch.setattr(paged_kv_cache, "rounded_through", wrong)
    results = answers("qwen2", ONE, **CONFIG, **E4M3)
    assert all(least_off_by("qwen2", result, "fp8_e4m3") > 10 * TOLERANCE for result in results[3:])


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
