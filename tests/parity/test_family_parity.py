"""Every family through the whole engine on ranks as threads, tensor parallelism included: the answers of Transformers.

The negative controls at the end make one thing wrong each, and must be seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import pytest
import torch
from thread_tp import on_ranks
from transformers import (
    AutoConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import cpinfer
from cpinfer.attention.layer import AttentionLayer, LatentLayer
from cpinfer.attention.steps import DecodeStep, PrefillStep
from cpinfer.config import SamplingParams
from cpinfer.engine.attach import model_spec
from cpinfer.engine.request import RolloutResult
from cpinfer.engine.scheduler_stats import SchedulerStats
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import GroupHeads, HeadPlacement
from cpinfer.models import latent_attention
from cpinfer_tools.verify import check_rollout
from every_family import OFTEN, SELDOM, WITH_STATES, WITHOUT_TP
from tiny_models import EXPERTS, FAMILIES, LATENT, SETTINGS, TINY, YARN, make_model, prompts_of

TOLERANCE = 1e-4
PROMPTS = prompts_of((1, 3, 17, 70, 150), vocab_size=128)
GREEDY = SamplingParams(temperature=0, max_new_tokens=10)
SLOW = pytest.mark.slow
# One family for each kind of attention: full, windows, both with soft caps, both with sinks, latent. The others are
# slow where a test asks more of the scheduler than of attention.
OF_EACH_KIND = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v2")
# Interleave and blocks that do not divide, and a pool that takes no time to clear.
CONFIG: dict[str, Any] = {"cp_kv_cache_interleave_size": 3, "block_size": 4, "kv_cache_gib": 2**-8}
# Longer than the windows of 24, shorter than what four shards can share evenly: chunks end within blocks.
CHUNKS: dict[str, Any] = {**CONFIG, "max_num_batched_tokens": 33}
# Of a tight pool: enough for any one sequence, too few for six.
NUM_BLOCKS = 9

# Of 2 KV heads, which the GQA families have, tp4 makes copies; the DCP groups of the last two grids hold both.
GRIDS = [
    RankGrid(),
    RankGrid(tp_size=2),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(tp_size=4, dcp_size=2),
    RankGrid(tp_size=2, dcp_size=2),
    RankGrid(tp_size=2, pcp_size=2, dcp_size=4),
]
PCP2_DCP2, TP2_DCP2, TP2_PCP2_DCP4 = GRIDS[2], GRIDS[4], GRIDS[5]
# Two homes each.
PCP2_DCP1, PCP4_DCP2 = RankGrid(pcp_size=2, dcp_size=1), RankGrid(pcp_size=4, dcp_size=2)


def grid_name(grid: RankGrid) -> str:
    return f"tp{grid.tp_size}_pcp{grid.pcp_size}_dcp{grid.dcp_size}"


def name(value: Any) -> str:
    return grid_name(value) if isinstance(value, RankGrid) else str(value)


def each(
    *grids: RankGrid, slow: Sequence[RankGrid] = (), often: Container[str] = OFTEN, without: Container[str] = ()
) -> list[Any]:
    """All families on all grids that may cut them, but those `without`; fast are those `often` on `grids`."""
    return [
        pytest.param(family, grid, marks=() if family in often and grid not in slow else SLOW)
        for grid in (*grids, *slow)
        for family in FAMILIES
        if (grid.tp_size == 1 or family not in WITHOUT_TP) and family not in without
    ]


class Whole:
    """An unsharded model, and what Transformers makes of prompts with it, each worked out once."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.model = make_model(config)
        self._continued: dict[tuple[tuple[int, ...], int], tuple[list[int], torch.Tensor]] = {}

    def differences(self, results: Sequence[RolloutResult]) -> list[float]:
        """For each greedy result the largest difference of a logprob; infinite where tokens differ, or it is NaN."""
        found = []
        for result in results:
            tokens, logprobs = self._greedy(result.prompt_token_ids, len(result.token_ids))
            worst = (logprobs - torch.tensor(result.logprobs)).abs().max().item()
            comparable = list(result.token_ids) == tokens and not math.isnan(worst)  # max() would pass over a NaN
            found.append(worst if comparable else math.inf)
        return found

    def _greedy(self, prompt: tuple[int, ...], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        key = (tuple(prompt), num_tokens)
        if key not in self._continued:
            tokens = check_rollout.generate_greedy(self.model, prompt, num_tokens)
            self._continued[key] = (tokens, check_rollout.score(self.model, prompt, tokens))
        return self._continued[key]


@functools.cache
def whole(family: str) -> Whole:
    return Whole(FAMILIES[family])


def differences(of: Whole, grid: RankGrid, sampling: SamplingParams = GREEDY, **config: Any) -> list[float]:
    """How greedy answers of `grid` differ from those of the whole model. All ranks must return the same."""
    ranks = on_ranks(of.model, grid, lambda engine: engine.generate(PROMPTS, sampling), **config)
    answers = [[(r.token_ids, r.logprobs) for r in results] for results in ranks]
    assert all(other == answers[0] for other in answers)
    assert [len(tokens) for tokens, _ in answers[0]] == [sampling.max_new_tokens] * len(PROMPTS)
    return of.differences(ranks[0])


def test_the_grids_copy_heads_and_mix_them() -> None:
    heads = {grid: model_spec(whole("llama").model).heads(grid.tp_size) for grid in GRIDS}
    assert [grid for grid in GRIDS if heads[grid].rep > 1] == [GRIDS[3]]
    assert [grid for grid in GRIDS if heads[grid].mixes_heads(grid)] == [TP2_DCP2, TP2_PCP2_DCP4]


@pytest.mark.parametrize(("family", "grid"), each(*GRIDS), ids=name)
def test_greedy_tokens_and_logprobs_equal_transformers(family: str, grid: RankGrid) -> None:
    assert max(differences(whole(family), grid, **CONFIG)) <= TOLERANCE


@pytest.mark.parametrize("family", SELDOM)
def test_families_that_fast_tests_leave_out_are_exact_where_most_can_go_wrong(family: str) -> None:
    grid = PCP2_DCP2 if family in WITHOUT_TP else TP2_PCP2_DCP4
    assert max(differences(whole(family), grid, **CHUNKS)) <= TOLERANCE


# Who exchanges what behind the first chunk.
EXCHANGES: dict[str, dict[str, Any]] = {
    "queries": {"context_exchange": "queries"},
    "kv_ag_rs": {"context_exchange": "kv", "context_workspace_tokens": 20, "decode_exchange": "ag_rs"},
}


@pytest.mark.parametrize(
    ("family", "grid", "exchange"),
    [
        # Fast: a family by either exchange, the grids of both in turn.
        pytest.param(*case.values, exchange, marks=(*case.marks, *([SLOW] if (i + j) % 2 else [])))
        for grids, slow in (((PCP2_DCP2,), ()), ((TP2_PCP2_DCP4,), (TP2_DCP2,)))
        for i, case in enumerate(each(*grids, slow=slow), start=grids[0].tp_size)
        for j, exchange in enumerate(EXCHANGES)
    ],
    ids=name,
)
def test_prompts_may_come_in_chunks(family: str, grid: RankGrid, exchange: str) -> None:
    assert max(differences(whole(family), grid, **CHUNKS, **EXCHANGES[exchange])) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "grid"),
    each(PCP2_DCP1, PCP4_DCP2, slow=[RankGrid(tp_size=2, pcp_size=2, dcp_size=1)]),
    ids=name,
)
def test_sequences_may_live_in_different_homes(family: str, grid: RankGrid) -> None:
    assert max(differences(whole(family), grid, **CHUNKS)) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        *each(RankGrid(tp_size=2, pcp_size=2, dcp_size=2), often=OF_EACH_KIND, without=WITH_STATES),
        *(pytest.param(family, PCP2_DCP2, marks=SLOW) for family in sorted(WITHOUT_TP - WITH_STATES)),
    ],
    ids=name,
)
def test_queries_may_be_replicated(family: str, grid: RankGrid) -> None:
    assert max(differences(whole(family), grid, **CHUNKS, decode_exchange="replicate_q")) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        *each(TP2_DCP2, without=WITH_STATES),
        *each(PCP2_DCP1, slow=[TP2_PCP2_DCP4], often=OF_EACH_KIND, without=WITH_STATES),
    ],
    ids=name,
)
def test_what_is_reused_of_a_prefix_is_what_was_computed(family: str, grid: RankGrid) -> None:
    prompt = PROMPTS[-1]
    unit = 12 * grid.dcp_size
    remembered = len(prompt) // unit * unit

    def body(engine: cpinfer.Engine) -> tuple[list[RolloutResult], list[SchedulerStats]]:
        results, stats = [], []

        def generate(prompt: Sequence[int], n: int = 1) -> list[RolloutResult]:
            found = engine.generate([prompt], dataclasses.replace(GREEDY, n=n))
            results.extend(found)
            stats.append(engine.stats)
            return found

        [first] = generate(prompt)
        generate(prompt)
        generate([*prompt, *first.token_ids, 5, 6, 7])
        generate([*PROMPTS[3], *prompt], n=3)
        return results, stats

    ranks = on_ranks(whole(family).model, grid, body, **CONFIG)
    results, (first, again, next_turn, samples) = ranks[0]
    assert all(stats == ranks[0][1] for _, stats in ranks)
    assert (first.num_cached_prefill_tokens, first.num_computed_prefill_tokens) == (0, 150)
    assert (again.num_cached_prefill_tokens, again.num_computed_prefill_tokens) == (remembered, 150 - remembered)
    assert next_turn.num_cached_prefill_tokens >= remembered > 0
    assert (samples.num_cached_prefill_tokens, samples.num_computed_prefill_tokens) == (0, 220)
    assert len(results) == 6 and max(whole(family).differences(results)) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "grid"), each(PCP2_DCP2, slow=[TP2_PCP2_DCP4], often=OF_EACH_KIND, without=WITH_STATES), ids=name
)
def test_a_tight_pool_preempts_and_changes_no_answer(family: str, grid: RankGrid) -> None:
    """Prompts are short and answers long, so that windows, whose dead blocks are given back, do not make room."""
    prompts = prompts_of([9] * 6, vocab_size=128)
    sampling = SamplingParams(temperature=0, max_new_tokens=24)

    def body(engine: cpinfer.Engine) -> tuple[list[RolloutResult], int]:
        assert engine.kv_capacity_tokens == NUM_BLOCKS * 4 * grid.dcp_size
        return engine.generate(prompts, sampling), engine.stats.num_preemptions

    [(results, num_preemptions), *_] = on_ranks(whole(family).model, grid, body, **tight(family, grid))
    assert num_preemptions > 0
    assert len(results) == 6 and max(whole(family).differences(results)) <= TOLERANCE


def tight(family: str, grid: RankGrid) -> dict[str, Any]:
    spec = model_spec(whole(family).model)
    per_token = spec.kv_layout(spec.heads(grid.tp_size).max_stored_heads(grid)).bytes_per_token(2, "float32")
    return {**CONFIG, "kv_cache_gib": NUM_BLOCKS * 4 * per_token / 2**30}


# --- what families have besides the settings of the tiny models ---

# A layer that sees all, then layers that do not.
WINDOWS_IN_PART = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
LAYERS = {"num_hidden_layers": 3}
WIDER = {"first_k_dense_replace": 0, "v_head_dim": 20}


def settings(family: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**TINY, **SETTINGS[family], **changes})


VARIANTS: dict[str, PretrainedConfig] = {
    "llama with biases": LlamaConfig(**TINY, attention_bias=True),
    "llama with 8 KV heads": LlamaConfig(**{**TINY, "num_key_value_heads": 8}),
    "mistral without window": MistralConfig(**TINY, sliding_window=None),
    "mixtral with a window": MixtralConfig(**TINY, **EXPERTS, num_local_experts=4, sliding_window=20),
    "qwen2 with windows": Qwen2Config(**{**TINY, **LAYERS}, **WINDOWS_IN_PART),
    "qwen3 with windows": Qwen3Config(**{**TINY, **LAYERS}, **WINDOWS_IN_PART, head_dim=16),
    "qwen3_moe with a window": Qwen3MoeConfig(
        **TINY,
        **EXPERTS,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=48,
        use_sliding_window=True,
        sliding_window=20,
    ),
    "deepseek_v2 with latent queries": DeepseekV2Config(
        **{**TINY, **LATENT, **WIDER}, q_lora_rank=32, rope_parameters=YARN
    ),
    "deepseek_v3 without latent queries": DeepseekV3Config(
        **{**TINY, **LATENT, **WIDER}, q_lora_rank=None, rope_interleave=False
    ),
    "exaone4 without windows": settings("exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
    "gemma of one KV head": settings("gemma", num_key_value_heads=1),
    "glm4_moe without norms of heads": settings("glm4_moe", use_qk_norm=False, attention_bias=False),
    "phimoe without a window": settings("phimoe", sliding_window=None, attention_bias=True),
    "stablelm of layers one after another": settings("stablelm", use_parallel_residual=False, use_qkv_bias=False),
    "starcoder2 without a window": settings("starcoder2", sliding_window=None),
}
# With weights for all heads in one norm.
WITH_WHOLE_NORMS = {
    "cohere": settings("cohere", use_qk_norm=True),
    "stablelm": settings("stablelm", qk_layernorm=True),
}


@pytest.mark.parametrize(
    ("variant", "grid"),
    [
        pytest.param(variant, grid, marks=SLOW if grid == PCP4_DCP2 else ())
        for variant, config in VARIANTS.items()
        for grid in (PCP2_DCP2 if config.model_type in WITHOUT_TP else TP2_PCP2_DCP4, PCP4_DCP2)
    ],
    ids=name,
)
def test_variants_of_a_family_are_as_exact(variant: str, grid: RankGrid) -> None:
    assert max(differences(Whole(VARIANTS[variant]), grid, **CHUNKS)) <= TOLERANCE


@pytest.mark.parametrize("family", WITH_WHOLE_NORMS)
def test_norms_of_all_heads_are_exact_and_no_tensor_parallelism_cuts_them(family: str) -> None:
    of = Whole(WITH_WHOLE_NORMS[family])
    assert max(differences(of, PCP2_DCP2, **CHUNKS)) <= TOLERANCE
    with pytest.raises(UserError, match=rf'"{family}" with tp=2 \(its queries and keys are normalised over all'):
        differences(of, TP2_DCP2, **CHUNKS)
    assert max(differences(whole(family), TP2_DCP2, **CHUNKS)) <= TOLERANCE


def test_gpt_bigcode_with_a_kv_head_for_every_query_is_exact_without_tp() -> None:
    settings = {**FAMILIES["gpt_bigcode"].to_dict(), "multi_query": False}
    of = Whole(GPTBigCodeConfig(**settings))
    assert max(differences(of, PCP2_DCP2, **CHUNKS)) <= TOLERANCE


@pytest.mark.parametrize(
    "num_q_heads, num_kv_heads, grid",
    [
        (6, 3, RankGrid(tp_size=3)),
        (6, 3, RankGrid(tp_size=3, dcp_size=3)),  # one group of three heads
        (6, 3, RankGrid(tp_size=3, pcp_size=2, dcp_size=6)),
        (6, 2, RankGrid(tp_size=2, pcp_size=3, dcp_size=6)),
        (12, 2, RankGrid(tp_size=6, dcp_size=2)),  # groups of one head, of two, of one
        (12, 2, RankGrid(tp_size=6, dcp_size=3)),  # copies become shards
        (12, 3, RankGrid(tp_size=6, dcp_size=3)),  # groups of two heads that share queries 2 to 1 and 1 to 2
        (12, 3, RankGrid(tp_size=6, dcp_size=6)),
        (8, 4, RankGrid(tp_size=2, pcp_size=2, dcp_size=4)),  # two heads on each column
    ],
    ids=lambda x: grid_name(x) if isinstance(x, RankGrid) else str(x),
)
def test_head_counts_that_hardly_divide_are_as_exact(num_q_heads: int, num_kv_heads: int, grid: RankGrid) -> None:
    heads = {"num_attention_heads": num_q_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 96}
    of = Whole(Qwen2Config(**{**TINY, **heads}, **WINDOWS_IN_PART))
    few_tokens = SamplingParams(temperature=0, max_new_tokens=4)
    # Both ways of context over mixed heads are other tests' matter, of attention and of every family.
    assert max(differences(of, grid, few_tokens, **CHUNKS)) <= TOLERANCE


# --- negative controls ---

# Families whose small models were deaf to attention before their multipliers were 1.
SMALL_LOGITS = ("apertus", "cohere", "cohere2")
Patch = Callable[[pytest.MonkeyPatch], None]


def layers_without(**wrong: Any) -> Patch:
    """In the steps, behind the check that layers say what the config says."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        for step in (PrefillStep, DecodeStep):

            def attend(own: Any, layer: AttentionLayer, *qkv: Any, inner: Any = step.attend) -> Any:
                return inner(own, dataclasses.replace(layer, **wrong), *qkv)

            patch.setattr(step, "attend", attend)

    return patched


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in SMALL_LOGITS else SLOW) for f in SELDOM])
def test_a_softmax_that_is_a_tenth_too_sharp_is_seen(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    def attend(own: Any, layer: AttentionLayer, *qkv: Any, inner: Any) -> Any:
        return inner(own, dataclasses.replace(layer, scale=1.1 * layer.scale), *qkv)

    for step in (PrefillStep, DecodeStep):
        monkeypatch.setattr(step, "attend", functools.partialmethod(attend, inner=step.attend))
    assert max(differences(whole(family), PCP2_DCP2, **CHUNKS)) > 100 * TOLERANCE


def sinks_of_the_first_rank_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HeadPlacement, "q_heads", lambda heads, tp_rank: range(heads.q_heads_per_rank))


def group_heads_with(wrong: Callable[[GroupHeads], dict[str, Any]]) -> Patch:
    in_group = HeadPlacement.in_group

    def tampered(heads: HeadPlacement, grid: RankGrid, tp_rank: int) -> GroupHeads:
        found = in_group(heads, grid, tp_rank)
        return dataclasses.replace(found, **wrong(found))

    return lambda patch: patch.setattr(HeadPlacement, "in_group", tampered)


def next_heads_keys(patch: pytest.MonkeyPatch) -> None:
    absorb = LatentLayer.absorb
    patch.setattr(
        LatentLayer, "absorb", lambda layer, q: absorb(dataclasses.replace(layer, w_k=layer.w_k.roll(1, 0)), q)
    )


def keys_unrotated(patch: pytest.MonkeyPatch) -> None:
    rotate = latent_attention._rotate
    patch.setattr(latent_attention, "_rotate", lambda module, q, k, cos_sin: (rotate(module, q, k, cos_sin)[0], k))


@pytest.mark.parametrize(
    "make_wrong, family, grid",
    [
        (layers_without(sinks=None), "gpt_oss", PCP2_DCP2),
        (sinks_of_the_first_rank_for_all, "gpt_oss", TP2_DCP2),
        (layers_without(window=None), "gemma3_text", PCP2_DCP2),
        (layers_without(soft_cap=None), "gemma2", PCP2_DCP2),
        # The stored heads in another order than queries look for them; then cached heads of the other column.
        (group_heads_with(lambda found: {"columns": found.columns[::-1]}), "qwen2", TP2_DCP2),
        (group_heads_with(lambda found: {"own": slice(0, 1)}), "qwen2", TP2_PCP2_DCP4),
        # A group of mixed heads that takes its own for all queries.
        (group_heads_with(lambda found: {"columns": (found.own.start, found.own.start)}), "mixtral", TP2_DCP2),
        (next_heads_keys, "deepseek_v2", PCP2_DCP2),
        (keys_unrotated, "deepseek_v3", TP2_DCP2),
    ],
    ids=[
        "no_sinks",
        "sinks_of_rank_0",
        "no_window",
        "no_soft_cap",
        "columns_swapped",
        "cached_heads_of_column_0",
        "own_head_for_all",
        "latent_heads_rolled",
        "keys_unrotated",
    ],
)
def test_what_is_made_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, make_wrong: Patch, family: str, grid: RankGrid
) -> None:
    config: dict[str, Any] = {**CHUNKS, "context_exchange": "kv"}
    assert max(differences(whole(family), grid, **config)) <= TOLERANCE
    make_wrong(monkeypatch)
    assert max(differences(whole(family), grid, **config)) > 100 * TOLERANCE
