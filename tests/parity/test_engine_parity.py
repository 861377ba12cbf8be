"""The whole engine on ranks as threads, against Transformers on the unsharded model: same tokens, same logprobs."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import check_rollout
import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import EngineFaultError
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

RECALL_TINY = "configs/recall-tiny"
TOLERANCE = 1e-4
GRIDS = [
    RankGrid(),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(pcp_size=3, dcp_size=3),
    RankGrid(pcp_size=4, dcp_size=4),
]


def grid_name(grid: RankGrid) -> str:
    return f"pcp{grid.pcp_size}_dcp{grid.dcp_size}"


@pytest.fixture(scope="module")
def recall_tiny() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(RECALL_TINY, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(RECALL_TINY)


def generate(
    model: Any,
    grid: RankGrid,
    prompts: Sequence[Any],
    sampling: SamplingParams,
    tokenizer: Any = None,
    **config: Any,
) -> list[RolloutResult]:
    """What all ranks of `grid` return; they must return the same."""
    parsed = parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            **config,
        }
    )

    def body(topology: cpinfer.Topology) -> list[RolloutResult]:
        with cpinfer.attach(copy.deepcopy(model), topology, parsed, tokenizer=tokenizer) as engine:
            return engine.generate(prompts, sampling)

    ranks = run_ranks(grid, body)
    for other in ranks[1:]:
        assert [r.token_ids for r in other] == [r.token_ids for r in ranks[0]]
        assert [r.logprobs for r in other] == [r.logprobs for r in ranks[0]]
    return ranks[0]


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_equal_transformers(family: str, grid: RankGrid) -> None:
    model = make_model(FAMILIES[family])
    prompts = prompts_of((1, 2, 3, 17, 64, 200), vocab_size=128)
    sampling = SamplingParams(temperature=0, max_new_tokens=12)
    for result in generate(model, grid, prompts, sampling, cp_kv_cache_interleave_size=3, block_size=4):
        assert list(result.token_ids) == check_rollout.generate_greedy(model, result.prompt_token_ids, 12)
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE
        assert result.finish_reason == "length"


@pytest.mark.parametrize("grid", GRIDS[1:], ids=grid_name)
def test_recall_tiny_answers_alike_in_every_layout(recall_tiny: tuple[Any, Any], grid: RankGrid) -> None:
    model, tokenizer = recall_tiny
    with open("configs/recall-tiny-prompts.jsonl", encoding="utf-8") as lines:
        prompts = [json.loads(line) for _, line in zip(range(12), lines, strict=False)]
    sampling = SamplingParams(temperature=0, max_new_tokens=16)
    results = generate(model, grid, prompts, sampling, tokenizer)
    assert [r.text.strip() for r in results if r.text] == [prompt["answer"].strip() for prompt in prompts]
    assert {r.finish_reason for r in results} == {"stop"}


def test_sampled_text_does_not_depend_on_layout_or_company() -> None:
    model = make_model(FAMILIES["qwen2"])
    prompts = [
        {"id": f"p{i}", "prompt_token_ids": p} for i, p in enumerate(prompts_of((5, 40, 9, 130, 1, 77), vocab_size=128))
    ]
    sampling = SamplingParams(temperature=1.0, top_p=0.95, max_new_tokens=10, n=2, seed=11)
    alone = generate(model, RankGrid(), prompts, sampling)
    assert len({r.token_ids for r in alone}) == len(alone), "samples must differ for this to mean anything"
    layouts: list[tuple[RankGrid, dict[str, Any]]] = [
        (RankGrid(pcp_size=2, dcp_size=2), {}),
        (RankGrid(pcp_size=3, dcp_size=3), {"cp_kv_cache_interleave_size": 1}),
        (RankGrid(), {"max_num_seqs": 1}),
        (RankGrid(pcp_size=2, dcp_size=2), {"max_num_seqs": 3, "block_size": 4, "max_num_batched_tokens": 140}),
    ]
    for grid, config in layouts:
        again = generate(model, grid, prompts, sampling, **config)
        assert [r.token_ids for r in again] == [r.token_ids for r in alone], (grid, config)
    reversed_order = generate(model, RankGrid(), prompts[::-1], sampling)
    assert {(r.id, r.sample_index): r.token_ids for r in reversed_order} == {
        (r.id, r.sample_index): r.token_ids for r in alone
    }
    other_seed = generate(model, RankGrid(), prompts, SamplingParams(temperature=1.0, max_new_tokens=10, n=2, seed=12))
    assert [r.token_ids for r in other_seed] != [r.token_ids for r in alone]


@pytest.mark.parametrize("grid", GRIDS[:2], ids=grid_name)
def test_bfloat16_logprobs_are_as_good_as_those_of_transformers_generate(grid: RankGrid) -> None:
    """Rounding differs between kernels; the yardstick is the same weights in float32, which both can only approach."""
    model = make_model(FAMILIES["llama"]).bfloat16()
    exact = copy.deepcopy(model).float()
    prompts = prompts_of([30, 100, 200] * 4, vocab_size=128)
    num_tokens = 24
    ours = [
        check_rollout.score(exact, r.prompt_token_ids, r.token_ids) - torch.tensor(r.logprobs)
        for r in generate(model, grid, prompts, SamplingParams(max_new_tokens=num_tokens), dtype="bfloat16")
    ]
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=True,
            top_k=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :]
        logprobs = torch.log_softmax(torch.cat(out.logits).float(), dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
        theirs.append(check_rollout.score(exact, prompt, tokens.tolist()) - logprobs)
    assert torch.cat(ours).abs().mean() <= 1.5 * torch.cat(theirs).abs().mean()


def test_no_request_at_all_gives_no_result(recall_tiny: tuple[Any, Any]) -> None:
    assert generate(recall_tiny[0], RankGrid(), [], SamplingParams(temperature=0)) == []


def test_more_requests_than_the_pool_holds_at_once_all_finish() -> None:
    model = make_model(FAMILIES["llama"])
    prompts = prompts_of([100] * 24, vocab_size=128)
    sampling = SamplingParams(temperature=0, max_new_tokens=8)
    roomy = generate(model, RankGrid(), prompts, sampling)
    # A token takes 256 bytes here and a sequence 7 blocks of 16, so this pool holds 3 sequences at once.
    tight = generate(model, RankGrid(), prompts, sampling, kv_cache_gib=24 * 16 * 256 / 2**30)
    assert [r.token_ids for r in tight] == [r.token_ids for r in roomy]
    with pytest.raises(cpinfer.UserError, match="the KV pool holds 96"):
        generate(model, RankGrid(), prompts, sampling, kv_cache_gib=6 * 16 * 256 / 2**30)


def test_weights_that_give_nan_raise_on_every_rank() -> None:
    model = make_model(FAMILIES["llama"])
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(EngineFaultError, match="not finite"):
        generate(model, RankGrid(pcp_size=2, dcp_size=2), prompts_of([5], 128), SamplingParams(max_new_tokens=2))
