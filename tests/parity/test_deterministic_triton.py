"""The deterministic mode by its Triton kernels, run by Triton's interpreter: the same bits in every layout.

On CPU as what `test_deterministic.py` runs, but for products, sums and attention, which are those of a GPU. Triton
reads `TRITON_INTERPRET` when it is imported, so a model runs in a process of its own.
"""

from __future__ import annotations

import importlib.util

import pytest

from triton_runs import output_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(600),
]

RUN = """
import copy, json
import torch
import triton_runs
import cpinfer
import cpinfer.attention.exchanges.ordered as ordered
import cpinfer.engine.logits_reader as logits_reader
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer.models.invariant_rows import invariant_rows
from tiny_models import FAMILIES, make_model, prompts_of

VOCAB = 128
PROMPTS = [{"prompt_token_ids": tokens, "id": f"{i}"} for i, tokens in enumerate(prompts_of(LENGTHS, vocab_size=VOCAB))]
SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_new_tokens=2, top_logprobs=VOCAB)
CONFIG = {
    "kv_cache_gib": 2**-9,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "deterministic": True,
    "deterministic_kv_shards": 4,
}

def run(model, grid=RankGrid(), **config):
    def body(topology):
        with cpinfer.attach(copy.deepcopy(model), topology, parse_config({**CONFIG, **config})) as engine:
            results = engine.generate(PROMPTS, SAMPLING)
            return [(r.id, r.token_ids, r.logprobs, r.processed_logprobs, r.top_logprobs) for r in results]
    return run_ranks(grid, body, timeout_s=300)[0]

def largest_difference(a, b):
    if [x[:2] for x in a] != [x[:2] for x in b]:  # rounding made another draw, and all that follows is other text
        return None
    return max(abs(p - q) for x, y in zip(a, b) for p, q in zip(x[2], y[2]))

def model_of(family, dtype, num_layers):
    config = copy.deepcopy(FAMILIES[family])
    if num_layers:
        config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
    return make_model(config).to(getattr(torch, dtype))

torch.set_num_threads(1)
model = model_of(*GIVEN)
by_cpu = run(model, **MORE)
triton_runs.force_triton()
logits_reader.nullcontext = invariant_rows  # as on a GPU
expected = run(model, **MORE)
same = [run(model, RankGrid(**grid), **{**MORE, **config}) == expected for grid, config in WAYS]
merge = ordered.merge_ordered
ordered.merge_ordered = lambda outs, lses: merge(outs.flip(0), lses.flip(0))
control = run(model, **MORE) != expected
print(json.dumps([same, control, by_cpu == expected, largest_difference(by_cpu, expected)]))
"""
TWO = ({"pcp_size": 2, "dcp_size": 2}, {"max_num_batched_tokens": 17})
MORE_WAYS = [
    TWO,
    ({"pcp_size": 2, "dcp_size": 1}, {}),
    ({"pcp_size": 4, "dcp_size": 2}, {"max_num_batched_tokens": 100}),
    ({}, {"max_num_seqs": 1, "enable_prefix_caching": False}),
]


def outcome(
    given: tuple[str, str, int | None],
    ways: list[tuple[object, object]],
    lengths: tuple[int, ...] = (5, 37),
    **more: str,
) -> list[object]:
    told = f"GIVEN, WAYS, LENGTHS, MORE = {given!r}, {ways!r}, {lengths!r}, {more!r}\n"
    found: list[object] = output_of(told + RUN, timeout_s=500, TRITON_INTERPRET="1")
    return found


def test_layouts_have_the_same_bits() -> None:
    same, control, is_cpu, difference = outcome(("qwen2", "float32", 1), [TWO], lengths=(5, 23))
    assert same == [True] and control and not is_cpu, "the kernels of CPU ran instead"
    assert isinstance(difference, float) and difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "deepseek_v3", "mixtral", "gpt_bigcode"])
def test_families_have_the_same_bits_in_more_layouts(family: str, dtype: str) -> None:
    same, control, _, _ = outcome((family, dtype, None), MORE_WAYS)
    assert same == [True] * len(MORE_WAYS)
    assert control or dtype == "bfloat16", "which rounds the difference away, in so few tokens"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e5m2"])
def test_a_rounded_cache_has_the_same_bits(cache: str) -> None:
    same, control, _, _ = outcome(("qwen2", "float32", None), MORE_WAYS, kv_cache_dtype=cache)
    assert same == [True] * len(MORE_WAYS) and control
