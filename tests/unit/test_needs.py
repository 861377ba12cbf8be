"""What a KV budget buys: blocks, and of a model with states as many of these as sequences may run, up to half of it."""

import dataclasses

import pytest
import torch

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize, LayerKind
from cpinfer.attention.backends.flashinfer import limits
from cpinfer.config import EngineConfig
from cpinfer.engine.needs import affordable_pool, attention_needs, kernel_bytes, replayed_sizes
from cpinfer.errors import UserError
from cpinfer.layout.capacity import KVLayout, PoolSize, StateLayout
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


# --- what kernels are asked for, and keep beside the pool ---

CUDA = torch.device("cuda")


def heads_of(spec, grid=RankGrid()):
    return spec.heads(grid.tp_size).in_group(grid, 0)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", [(False, False)]),
        ("mistral", [(True, False)]),
        ("gpt_oss", [(False, False), (True, False)]),
        ("gemma2", [(False, True), (True, True)]),
    ],
)
def test_needs_name_each_kind_of_layer_once(family, kinds):
    spec = ModelSpec.from_config(FAMILIES[family].to_dict())
    assert attention_needs(spec, heads_of(spec), torch.bfloat16).layers == tuple(LayerKind(*kind) for kind in kinds)


def test_replayed_plans_are_of_all_rows_of_a_home_in_each_batch_size():
    config = EngineConfig(cuda_graphs=True, max_num_seqs=9, block_size=16)
    spec = dataclasses.replace(SPEC, max_positions=100)
    blocks = KVSharding(2, 16, 16).num_blocks(100)
    # Nine sequences over two ranks are five at most on one.
    assert replayed_sizes(spec, config, RankGrid(1, 2, 2)) == tuple(FixedSize(n, n * blocks) for n in (2, 4, 8, 12))
    every_rank_all = dataclasses.replace(config, decode_exchange="replicate_q")
    assert [size.num_rows for size in replayed_sizes(spec, every_rank_all, RankGrid(1, 2, 2))] == [1, 2, 4, 6, 8, 12]
    assert replayed_sizes(spec, dataclasses.replace(config, cuda_graphs=False), RankGrid()) == ()


def test_what_kernels_keep_grows_with_what_is_replayed_by_little_and_with_kinds_of_layers():
    calls = ((32, KVLayout(8, 128, 128)),)
    sizes = tuple(FixedSize(n, n * 64) for n in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64))
    plain = AttentionNeeds(torch.bfloat16, calls)
    replayed = dataclasses.replace(plain, replayed=sizes)
    both_kinds = dataclasses.replace(plain, layers=(LayerKind(), LayerKind(has_window=True)))
    least, with_graphs, with_windows = (limits.device_bytes(x, 132) for x in (plain, replayed, both_kinds))
    assert least > limits.MIN_WORKSPACE_BYTES + limits.WRAPPER_BYTES
    # As they come, the wrappers of eleven sizes alone would take 89 MiB.
    assert 0 < with_graphs - least < 4 * 2**20
    assert with_windows - least >= limits.WRAPPER_BYTES


def test_of_free_memory_the_pool_has_its_share_once_kernels_have_theirs(monkeypatch):
    free = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    config = EngineConfig(block_size=16)

    def blocks(beside_bytes):
        return affordable_pool(SPEC, 2, RankGrid(), config, "float32", CUDA, beside_bytes).num_blocks

    per_block = PER_BLOCK * SPEC.num_kv_layers
    assert blocks(0) == free // 2 // per_block and blocks(2**28) == (free - 2**28) // 2 // per_block
    with pytest.raises(UserError, match="buys no block"):
        blocks(2 * free)
    asked = EngineConfig(block_size=16, kv_cache_gib=0.1)
    assert affordable_pool(SPEC, 2, RankGrid(), asked, "float32", CUDA, 2 * free).num_blocks > 0


def test_kernels_of_ours_keep_nothing_and_those_of_the_deterministic_mode_neither():
    for config in (EngineConfig(), EngineConfig(backend="torch"), EngineConfig(deterministic=True)):
        assert kernel_bytes(SPEC, heads_of(SPEC), RankGrid(), config, "float32", torch.device("cpu")) == 0
