"""The FlashInfer backend in every layout, and under the whole engine, through a literal interpreter of its wrappers.

What only a GPU can tell is whether the kernels do what their documentation says; everything before and behind them is
here: plans, page tables, states, pools of wrappers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_parity import TOLERANCE as LOGPROB_TOLERANCE
from test_engine_parity import generate, grid_name

from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.gpu.attention_ranks import Case, Tampering, run_case
from cpinfer_tools.verify import check_rollout
from fake_flashinfer import VERSIONS, fake_flashinfer
from tiny_models import FAMILIES, make_model, prompts_of

CPU = torch.device("cpu")
TOLERANCE = 1e-5
WRONG = 100 * TOLERANCE
LENGTHS = (1, 2, 5, 16, 17, 33, 65)


def through(**library: Any) -> Tampering:
    """Ranks compute with FlashInfer, of which nothing is checked: mistakes are for the comparison to find."""
    nothing = AttentionNeeds(torch.float32, ())

    def replace(_: AttentionBackend) -> AttentionBackend:
        return FlashInferBackend(CPU, nothing, fake_flashinfer(**library))

    return Tampering(backend=replace)


def case(tp: int, pcp: int, dcp: int, num_kv_heads: int, **changes: Any) -> Case:
    return Case(RankGrid(tp, pcp, dcp), 8, num_kv_heads, LENGTHS, **changes)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ((1, 1, 1, 2), {"block_size": 1}),
        ((1, 2, 2, 8), {"page_size": 4}),
        ((2, 1, 2, 1), {"interleave": 3}),
        ((2, 2, 4, 1), {"interleave": 3, "soft_cap": 4.0}),
        ((2, 2, 4, 2), {"page_size": 16}),
        ((1, 4, 2, 2), {"interleave": 1}),
    ],
    ids=str,
)
def test_attention_equals_dense_attention(layout: tuple[int, int, int, int], changes: dict[str, Any]) -> None:
    assert run_case(case(*layout, **changes), through()).max_error <= TOLERANCE


@pytest.mark.parametrize(("layout", "version"), [((1, 2, 2, 2), VERSIONS[0]), ((2, 2, 4, 1), VERSIONS[-1])], ids=str)
@pytest.mark.parametrize(
    ("window", "chunk", "exchange"),
    [(None, 16, "queries"), (None, 7, "kv"), (5, 7, "kv"), (24, 16, "kv"), (24, None, "kv")],
)
def test_context_and_windows_equal_dense_attention(
    window: int | None, chunk: int | None, exchange: Any, layout: tuple[int, int, int, int], version: str
) -> None:
    changes = {"window": window, "chunk": chunk, "context_exchange": exchange, "interleave": 3, "with_sinks": True}
    assert run_case(case(*layout, **changes), through(version=version)).max_error <= TOLERANCE


@pytest.mark.parametrize("library", [{"lse_base": math.e}, {"causal": "top-left"}], ids=str)
def test_what_the_self_check_is_for_would_be_seen_here(library: dict[str, Any]) -> None:
    """In chunks, so that there is context to merge and a mask whose two alignments differ."""
    assert run_case(case(1, 2, 2, 2, chunk=16), through(**library)).max_error > WRONG


@pytest.mark.parametrize(
    ("family", "version", "grid"),
    [
        ("llama", VERSIONS[0], RankGrid()),
        ("qwen2", VERSIONS[-1], RankGrid(pcp_size=2, dcp_size=2)),
        ("gemma2", VERSIONS[-1], RankGrid(pcp_size=2, dcp_size=2)),  # windows, soft caps
        ("gpt_oss", VERSIONS[0], RankGrid(pcp_size=2, dcp_size=1)),  # windows, sinks
        ("deepseek_v3", VERSIONS[0], RankGrid(pcp_size=2, dcp_size=2)),  # latents
        ("deepseek_v3", VERSIONS[-1], RankGrid()),
    ],
    ids=lambda x: grid_name(x) if isinstance(x, RankGrid) else x,
)
def test_greedy_tokens_and_logprobs_equal_transformers(
    on_flashinfer: Callable[[str], list[AttentionNeeds]], family: str, version: str, grid: RankGrid
) -> None:
    on_flashinfer(version)
    model = make_model(FAMILIES[family])
    prompts = prompts_of((1, 3, 17, 60), vocab_size=128)
    sampling = SamplingParams(temperature=0, max_new_tokens=8)
    # Chunks, so that prompts meet their own context.
    changes = {"cp_kv_cache_interleave_size": 3, "block_size": 4, "max_num_batched_tokens": 40}
    for result in generate(model, grid, prompts, sampling, **changes):
        assert list(result.token_ids) == check_rollout.generate_greedy(model, result.prompt_token_ids, 8)
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= LOGPROB_TOLERANCE


def test_samples_that_share_a_prefix_are_those_of_a_process_without(
    on_flashinfer: Callable[[str], list[AttentionNeeds]],
) -> None:
    model, prompts = make_model(FAMILIES["qwen2"]), prompts_of((60, 5, 33), vocab_size=128)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=8, n=3, seed=4)
    expected = generate(model, RankGrid(), prompts, sampling)
    on_flashinfer(VERSIONS[0])
    found = generate(model, RankGrid(pcp_size=2, dcp_size=2), prompts, sampling, cascade_attention="on", block_size=4)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
