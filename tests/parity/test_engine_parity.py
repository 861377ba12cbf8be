"""The whole engine on ranks as threads, against Transformers on the unsharded model: same tokens, same logprobs."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer.attention.cascade import CascadePlan
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import EngineFaultError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
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
            "kv_cache_gib": 2**-7,  # the default takes longer to clear than these models to run
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
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the others: test_family_parity
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


# --- what long rollouts need: chunks, shared prefixes, homes, preemption ---

SHARED = prompts_of((96,), vocab_size=128)[0]
LONG_GRIDS = [
    RankGrid(),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(pcp_size=2, dcp_size=1),
    RankGrid(pcp_size=4, dcp_size=2),
]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(FAMILIES["llama"])


@pytest.fixture(scope="module")
def expected(llama: Any) -> dict[tuple[str, int], tuple[int, ...]]:
    """Sampled text of `requests()` in the plainest way: one process, one sequence at a time, nothing shared."""
    plain = {"max_num_seqs": 1, "enable_prefix_caching": False}
    return texts(generate(llama, RankGrid(), requests(), SAMPLING, **plain))


SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=20, n=3, seed=2)


def requests() -> list[dict[str, Any]]:
    """Prompts that share a long beginning, of which one is a beginning of another, and some that share nothing."""
    tails = prompts_of((1, 3, 30, 64), vocab_size=128)
    shared = [SHARED + tail for tail in tails] + [SHARED[:70]]
    return [{"id": f"r{i}", "prompt_token_ids": p} for i, p in enumerate(shared + prompts_of((2, 17, 150), 128))]


def texts(results: Sequence[RolloutResult]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(r.id, r.sample_index): r.token_ids for r in results}


@pytest.mark.parametrize("grid", LONG_GRIDS, ids=grid_name)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_batched_tokens": 16, "block_size": 4, "cp_kv_cache_interleave_size": 2},
        {"max_num_batched_tokens": 50, "block_size": 4, "cp_kv_cache_interleave_size": 3, "context_exchange": "kv"},
        {"max_num_batched_tokens": 33, "context_exchange": "queries", "decode_exchange": "ag_rs"},
        {"max_num_seqs": 5, "block_size": 4, "decode_exchange": "replicate_q", "enable_prefix_caching": False},
        {"kv_cache_gib": 40 * 8 * 256 / 2**30, "block_size": 8, "context_workspace_tokens": 20},
        {"cascade_attention": "on", "block_size": 4},
        {"cascade_attention": "on", "block_size": 4, "kv_cache_gib": 60 * 4 * 256 / 2**30},
    ],
    ids=["default", "chunks16", "chunks50_kv", "chunks33_ag_rs", "replicate_q", "tight_pool", "cascade", "tight"],
)
def test_text_does_not_depend_on_chunks_prefixes_homes_or_preemption(
    llama: Any, expected: dict[tuple[str, int], tuple[int, ...]], grid: RankGrid, config: dict[str, Any]
) -> None:
    assert texts(generate(llama, grid, requests(), SAMPLING, **config)) == expected


def stats_of(model: Any, grid: RankGrid, prompts: Sequence[Any], sampling: SamplingParams, **config: Any) -> Any:
    parsed = parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            **config,
        }
    )

    def body(topology: cpinfer.Topology) -> Any:
        with cpinfer.attach(copy.deepcopy(model), topology, parsed) as engine:
            engine.generate(prompts, sampling)
            return engine.stats

    ranks = run_ranks(grid, body)
    assert all(stats == ranks[0] for stats in ranks)
    return ranks[0]


@pytest.mark.parametrize("grid", LONG_GRIDS, ids=grid_name)
def test_samples_of_one_prompt_prefill_it_once(llama: Any, grid: RankGrid) -> None:
    stats = stats_of(llama, grid, [SHARED], SamplingParams(max_new_tokens=4, n=8), enable_prefix_caching=False)
    assert (stats.num_computed_prefill_tokens, stats.num_cached_prefill_tokens) == (96, 0)


@pytest.mark.parametrize(
    ("num_tokens", "option", "expected"),
    [(96, "on", True), (450, "auto", True), (96, "auto", False), (450, "off", False)],
)
def test_samples_of_one_prompt_attend_to_it_together_where_it_is_long(
    llama: Any, monkeypatch: pytest.MonkeyPatch, num_tokens: int, option: str, expected: bool
) -> None:
    cuts = []

    def counted(*plans: Any) -> CascadePlan:
        cuts.append(plans)
        return CascadePlan(*plans)

    monkeypatch.setattr("cpinfer.attention.cascade.CascadePlan", counted)
    prompts, sampling = prompts_of((num_tokens,), vocab_size=128), SamplingParams(max_new_tokens=4, n=8)
    found = generate(llama, RankGrid(), prompts, sampling, cascade_attention=option)
    assert bool(cuts) == expected
    assert texts(found) == texts(generate(llama, RankGrid(), prompts, sampling, cascade_attention="off"))


def test_a_prefix_seen_before_is_not_computed_again(llama: Any) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=4)
    with cpinfer.attach(copy.deepcopy(llama), config=parse_config({"dtype": "float32"})) as engine:
        first = engine.generate([SHARED], sampling)[0]
        turn = [*SHARED, *first.token_ids, 5, 6, 7]
        second = engine.generate([turn], sampling)[0]
        # Blocks of 16: the first turn left 96 + 3 computed tokens, of which 96 are whole blocks.
        assert (engine.stats.num_cached_prefill_tokens, engine.stats.num_computed_prefill_tokens) == (96, 7)
        engine.weights_changed()
        third = engine.generate([turn], sampling)[0]
        assert engine.stats.num_cached_prefill_tokens == 0
        assert (second.weights_version, third.weights_version) == (0, 1)
    assert second.token_ids == third.token_ids == tuple(check_rollout.generate_greedy(llama, turn, 4))


def test_a_tight_pool_preempts_and_loses_nothing(llama: Any) -> None:
    prompts = prompts_of([40] * 12, vocab_size=128)
    sampling = SamplingParams(temperature=1, max_new_tokens=40, seed=1)
    tight = {"kv_cache_gib": 24 * 8 * 256 / 2**30, "block_size": 8}
    assert stats_of(llama, RankGrid(), prompts, sampling, **tight).num_preemptions > 0
    assert texts(generate(llama, RankGrid(), prompts, sampling, **tight)) == texts(
        generate(llama, RankGrid(), prompts, sampling)
    )


def test_asleep_the_pool_is_freed_and_awake_it_is_back(llama: Any) -> None:
    config = parse_config({"dtype": "float32", "kv_cache_gib": 0.05})
    with cpinfer.attach(copy.deepcopy(llama), config=config) as engine:
        before = engine.generate([SHARED], SamplingParams(temperature=0, max_new_tokens=3))
        pool = [weakref.ref(t) for t in engine._steps._cache._keys + engine._steps._cache._values]  # type: ignore[union-attr]
        assert sum(ref().nbytes for ref in pool) >= 0.99 * 0.05 * 2**30
        engine.sleep()
        gc.collect()
        assert all(ref() is None for ref in pool)
        with pytest.raises(RuntimeError, match="wake"):
            engine.generate([SHARED])
        engine.wake()
        after = engine.generate([SHARED], SamplingParams(temperature=0, max_new_tokens=3))
    assert [r.token_ids for r in before] == [r.token_ids for r in after]


def test_an_abandoned_stream_frees_its_blocks(llama: Any) -> None:
    with cpinfer.attach(copy.deepcopy(llama), config=parse_config({"dtype": "float32"})) as engine:
        each = [SamplingParams(max_new_tokens=length, n=4) for length in (5, 9, 9)]
        stream = engine.stream(prompts_of([9, 9, 9], 128), each)
        next(stream)
        stream.close()
        assert engine._core.is_idle
        assert len(engine.generate([[1, 2]], SamplingParams(max_new_tokens=2))) == 1


def test_each_prompt_may_have_its_own_sampling(llama: Any) -> None:
    prompts = prompts_of([9, 12], 128)
    each = [SamplingParams(temperature=0, max_new_tokens=3), SamplingParams(temperature=0, max_new_tokens=7)]
    with cpinfer.attach(copy.deepcopy(llama), config=parse_config({"dtype": "float32"})) as engine:
        assert [len(r.token_ids) for r in engine.generate(prompts, each)] == [3, 7]
        with pytest.raises(cpinfer.UserError, match="1 sampling parameters for 2 prompts"):
            engine.generate(prompts, each[:1])
