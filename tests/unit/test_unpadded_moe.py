"""Routers see every real token once, and nothing else: no dummy row, no padding."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import JobConfig
from cpinfer.layout.grid import RankGrid
from cpinfer.models import runner
from cpinfer.models.families import FAMILIES as TABLE
from cpinfer.models.unpadded_moe import UnpaddedMoE, is_moe_block
from every_family import OFTEN
from tiny_models import FAMILIES, make_model, prompts_of


def layers_with_experts(config):
    """How many a tiny model has by its config: all, or those behind the dense ones."""
    if not getattr(config, "num_experts_per_tok", None):
        return 0
    return config.num_hidden_layers - getattr(config, "first_k_dense_replace", 0)


EXPERTS = {family: count for family, config in FAMILIES.items() if (count := layers_with_experts(config))}
OFTEN_EXPERTS = [family if family in OFTEN else pytest.param(family, marks=pytest.mark.slow) for family in EXPERTS]
# Three running rows over two ranks: one of them has a padding row in every decode step. The first prompt leaves a rank
# without tokens, and so does the last row that runs alone.
PROMPTS = prompts_of((1, 20, 7), vocab_size=128)
NEW_TOKENS = (3, 3, 6)
GRID = RankGrid(1, 2, 2)


def routed(family, grid=GRID, **config):
    """(tokens that the routers of all ranks and layers saw, tokens that a rollout computes in them)."""
    model = make_model(FAMILIES[family])
    parsed = JobConfig(
        dtype="float32",
        kv_cache_gib=0.001,
        block_size=4,
        prefill_context_parallel_size=grid.pcp_size,
        decode_context_parallel_size=grid.dcp_size,
        **config,
    )

    def body(topology):
        own, seen = copy.deepcopy(model), Counter()
        for layer in own.model.layers:
            block = getattr(layer, "block_sparse_moe", None) or layer.mlp
            router = getattr(block, "router", None) or getattr(block, "gate", None)
            if is_moe_block(block):
                router.register_forward_hook(lambda _, args, out: seen.update(tokens=args[0].numel() // 64, calls=1))
        with cpinfer.attach(own, topology, parsed) as engine:
            for prompts, n in ((PROMPTS[:1], NEW_TOKENS[0]), (PROMPTS, NEW_TOKENS[1]), (PROMPTS[2:], NEW_TOKENS[2])):
                engine.generate(prompts, cpinfer.SamplingParams(temperature=0, max_new_tokens=n))
        return seen

    computed = sum(
        len(prompt) + n - 1  # the last token that is sampled is not computed
        for prompts, n in ((PROMPTS[:1], NEW_TOKENS[0]), (PROMPTS, NEW_TOKENS[1]), (PROMPTS[2:], NEW_TOKENS[2]))
        for prompt in prompts
    )
    return [seen["tokens"] for seen in run_ranks(grid, body)], computed * EXPERTS[family]


PLAIN = {"enable_prefix_caching": False}


@pytest.mark.parametrize("family", OFTEN_EXPERTS)
def test_routers_of_two_ranks_see_exactly_the_tokens_that_a_rollout_computes(family):
    seen, computed = routed(family, **PLAIN)
    assert sum(seen) == computed
    assert all(seen), "both ranks had work"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(1, 2, 1), RankGrid(1, 3, 3)], ids=str)
def test_the_same_on_one_rank_with_homes_and_in_chunks(family, grid):
    seen, computed = routed(family, grid, **PLAIN, max_num_batched_tokens=8)
    assert sum(seen) == computed


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_without_real_rows_dummies_and_padding_are_counted(family, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(runner, "is_moe_block", lambda module: False)
    seen, computed = routed(family, **PLAIN)
    assert sum(seen) > computed


def test_experts_are_told_by_what_blocks_are_made_of():
    assert {"mixtral", "gpt_oss", "phimoe"} < set(EXPERTS)
    for family, config in FAMILIES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found = [name for name, m in model.named_modules() if is_moe_block(m)]
        assert len(found) == EXPERTS.get(family, 0)
        assert all(name.endswith((".mlp", ".block_sparse_moe")) for name in found)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_row_of_the_table_says_what_a_familys_block_returns(family):
    """Of a block that says otherwise a rank without tokens would make something else than those that have some."""
    model = make_model(FAMILIES[family])
    [*_, block] = [module for module in model.modules() if is_moe_block(module)]
    found = block(torch.ones(1, 3, 64))
    assert isinstance(found, tuple) == TABLE[family].returns_router_scores


# --- the forward by itself ---


class Block(nn.Module):
    """Doubles its rows, and remembers which it was given."""

    def __init__(self, returns_scores):
        super().__init__()
        self.given = []
        self.returns_scores = returns_scores

    def run(self, x):
        self.given.append(x)
        return (2 * x, x[0, :, :1]) if self.returns_scores else 2 * x


def forward(count, num_rows, returns_scores):
    block, unpadded_moe = Block(returns_scores), UnpaddedMoE()
    unpadded_moe.count = count
    x = torch.arange(1.0, 1 + num_rows * 3).reshape(1, num_rows, 3)
    found = unpadded_moe.forward(block.run, x, returns_scores=returns_scores)
    out, scores = found if returns_scores else (found, None)
    return x, out, scores, block.given


@pytest.mark.parametrize("returns_scores", [False, True])
@pytest.mark.parametrize("count, num_rows", [(0, 1), (1, 1), (1, 3), (2, 3), (3, 3)])
def test_real_rows_go_through_the_block_and_the_rest_are_zeros(count, num_rows, returns_scores):
    x, out, scores, given = forward(count, num_rows, returns_scores)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert torch.equal(out[:, :count], 2 * x[:, :count]) and (out[:, count:] == 0).all()
    assert [len(rows[0]) for rows in given] == ([count] if count else [])
    if returns_scores and count:
        assert torch.equal(scores, x[0, :count, :1])
    if returns_scores and not count:
        assert scores is None


def test_a_step_without_padding_is_the_blocks_own_call():
    x, _, _, given = forward(3, 3, False)
    assert given[0].data_ptr() == x.data_ptr()
