"""The whole engine on ranks as threads, against Transformers on the unsharded model: same tokens, same logprobs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import check_rollout
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.layout.grid import RankGrid

RECALL_TINY = "configs/recall-tiny"
TOLERANCE = 1e-4
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "mistral": MistralConfig(**TINY, sliding_window=None),
}
GRIDS = [
    RankGrid(),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(pcp_size=3, dcp_size=3),
    RankGrid(pcp_size=4, dcp_size=4),
]


def grid_name(grid: RankGrid) -> str:
    return f"pcp{grid.pcp_size}_dcp{grid.dcp_size}"


def make_model(config: PretrainedConfig) -> Any:
    """A random model with peaked attention: projections large enough that logits of the softmax have std about 3."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(20)
            if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                weight.normal_()
            if name.endswith("lm_head.weight"):
                weight.mul_(10)
    return model


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


def prompts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


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
    lines = [line for line in open("configs/recall-tiny-prompts.jsonl", encoding="utf-8")][:12]
    prompts = [cpinfer_prompt(line) for line in lines]
    sampling = SamplingParams(temperature=0, max_new_tokens=16)
    alone = generate(model, RankGrid(), prompts, sampling, tokenizer)
    together = generate(model, grid, prompts, sampling, tokenizer)
    assert [(r.text, r.finish_reason) for r in together] == [(r.text, r.finish_reason) for r in alone]


def cpinfer_prompt(line: str) -> dict[str, Any]:
    import json

    data: dict[str, Any] = json.loads(line)
    return data


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
def test_bfloat16_logprobs_stay_close_to_the_training_forward(grid: RankGrid) -> None:
    """In bfloat16 rounding differs between kernels; on average the logprobs may not."""
    model = make_model(FAMILIES["llama"]).bfloat16()
    prompts = prompts_of((30, 100, 200), vocab_size=128)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=12)
    differences = []
    for result in generate(model, grid, prompts, sampling, dtype="bfloat16"):
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        differences.append((expected - torch.tensor(result.logprobs)).abs())
    print("mean", torch.cat(differences).mean())
    assert torch.cat(differences).mean() <= 0.1


def test_no_request_at_all_gives_no_result(recall_tiny: tuple[Any, Any]) -> None:
    assert generate(recall_tiny[0], RankGrid(), [], SamplingParams(temperature=0)) == []


def test_more_requests_than_the_pool_holds_at_once_all_finish() -> None:
    """0.001 GiB hold few sequences, so most must wait for blocks."""
    model = make_model(FAMILIES["llama"])
    prompts = prompts_of([100] * 24, vocab_size=128)
    sampling = SamplingParams(temperature=0, max_new_tokens=8)
    results = generate(model, RankGrid(), prompts, sampling, kv_cache_gib=0.0004)
    roomy = generate(model, RankGrid(), prompts, sampling)
    assert [r.token_ids for r in results] == [r.token_ids for r in roomy]
    assert max(r.ttft_s for r in results) > max(r.ttft_s for r in roomy) * 0.5


def test_weights_that_give_nan_raise_on_every_rank() -> None:
    model = make_model(FAMILIES["llama"])
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(cpinfer.errors.EngineFaultError, match="not finite"):
        generate(model, RankGrid(pcp_size=2, dcp_size=2), prompts_of([5], 128), SamplingParams(max_new_tokens=2))
