"""What a KV budget buys: blocks, and of a model with states as many of these as sequences may run, up to half of it."""

import dataclasses

import pytest
import torch

from cpinfer.config import EngineConfig
from cpinfer.engine.needs import affordable_pool
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize, StateLayout
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.shards import KVSharding
from cpinfer.models.spec import ModelSpec
from tiny_models import FAMILIES

LAYOUT = StateLayout(num_layers=1, num_k_heads=2, num_v_heads=4, k_dim=16, v_dim=16, conv_width=4)
SPEC = ModelSpec.from_config(FAMILIES["qwen3"].to_dict())
HYBRID = dataclasses.replace(SPEC, linear_layers=(0,), states=LAYOUT)
PER_STATE = 4 * (4 * 16 * 16 + 3 * (2 * 2 * 16 + 4 * 16))
PER_BLOCK = 16 * 2 * (2 * 16) * 4  # of one layer with two KV heads, in float32


def pool(spec, num_bytes, grid=RankGrid(), **keys):
    config = EngineConfig(kv_cache_gib=num_bytes / 2**30, block_size=16, **keys)
    return affordable_pool(spec, 2, grid, config, "float32", torch.device("cpu"))


def test_a_model_without_states_has_the_whole_budget_for_blocks():
    assert pool(SPEC, 10 * 2 * PER_BLOCK) == PoolSize(10, KVSharding(1, 16, 16), 0)


def test_layers_of_linear_attention_cost_no_blocks_and_a_state_for_each_sequence_that_may_run():
    assert LAYOUT.bytes_per_sequence("float32") == PER_STATE
    budget = 10 * PER_BLOCK + 7 * PER_STATE
    assert pool(HYBRID, budget, max_num_seqs=7) == PoolSize(10, KVSharding(1, 16, 16), 7)


@pytest.mark.parametrize("dcp", [1, 2])
def test_states_are_dealt_over_the_pcp_ranks_whatever_the_homes(dcp):
    grid = RankGrid(pcp_size=2, dcp_size=dcp)
    assert pool(HYBRID, 10 * PER_BLOCK + 4 * PER_STATE, grid, max_num_seqs=7).num_states == 4


def test_states_take_half_the_budget_at_most_and_one_of_them_must_fit():
    found = pool(HYBRID, 10 * PER_STATE, max_num_seqs=1000)
    assert (found.num_states, found.num_blocks) == (5, 5 * PER_STATE // PER_BLOCK)
    with pytest.raises(UserError, match=f"no state of a sequence, {PER_STATE} bytes. Raise kv_cache_gib"):
        pool(HYBRID, 2 * PER_STATE - 1)


def test_what_all_ranks_can_afford_is_the_fewest_of_both():
    sharding = KVSharding(1, 16, 16)
    pools = [PoolSize(9, sharding, 30), PoolSize(2**39, sharding, 4)]
    assert PoolSize.smallest([p.number for p in pools], sharding) == PoolSize(9, sharding, 4)
