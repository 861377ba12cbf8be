from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.cost_model import Link, Rates, StepSeconds, deal, decode_step, prefill, prefill_step
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.step_traffic import ModelSizes, PrefillWork, Widths

MODEL = ModelSizes(
    num_layers=4,
    hidden_size=512,
    vocab_size=1000,
    num_q_heads=8,
    num_kv_heads=2,
    kv_head=KVLayout(1, 64, 64),
    layer_params=4 * 2_800_000,
    windows=(None,) * 4,
)
MLA = replace(
    MODEL,
    num_kv_heads=1,
    kv_head=KVLayout(1, 576, 512, v_is_prefix_of_k=True),
    expanded_head=(192, 128),
    expand_params=4 * 512 * 8 * 256,
)
# Round numbers: each part of a step can be said by hand.
RATES = Rates(((1, 1e9), (1024, 1e12)), attention_flops=1e11, memory_bandwidth=1e10, link=Link(1e9, 1e-4))
WORDS = Widths(4, 4, 4)


def test_products_take_the_longer_of_arithmetic_at_the_rate_of_their_rows_and_of_reading_the_weights():
    rates = replace(RATES, memory_bandwidth=1e30)
    assert rates.product_s(1, 1e6, 4) == pytest.approx(2e6 / 1e9)
    assert rates.product_s(4096, 1e6, 4) == pytest.approx(2 * 4096e6 / 1e12)
    # Between two measured numbers of rows the rate is their geometric mean, halfway by factors.
    assert rates.product_s(32, 1e6, 4) == pytest.approx(2 * 32e6 / 10**10.5)
    assert RATES.product_s(1024, 1e6, 4) == pytest.approx(2 * 1024e6 / 1e12)
    assert replace(RATES, memory_bandwidth=1e6).product_s(1024, 1e6, 4) == 4.0
    assert RATES.product_s(0, 1e6, 4) == RATES.product_s(3, 0, 4) == 0


def test_a_decode_step_is_the_sum_that_can_be_written_by_hand():
    rates = replace(RATES, step_s=1e-3, layer_s=1e-4, row_s=1e-5, exchange_s=1e-6)
    step = decode_step(MODEL, RankGrid(pcp_size=2, dcp_size=2), rates, [999, 999], WORDS)
    b, keys = 4, 2 * 1000 / 2
    assert step.products == pytest.approx(rates.product_s(1, 4 * 2_800_000, b) + rates.product_s(1, 512_000, b))
    assert step.attention == pytest.approx(
        max(4 * keys * 8 * 4 * 64 / 1e11, 4 * keys * 2 * 128 * b / 1e10)  # layers, keys, heads, dims
    )
    gather, back, record = (8 + 2 * 2) * 64 * b, 8 * (64 * b + 4), 24
    assert step.links == pytest.approx((2 * 4 + 1) * 1e-4 + (4 * (gather + back) + record) / 1e9)
    assert step.host == pytest.approx(1e-3 + 4e-4 + 2e-5 + 4e-6)
    assert decode_step(MODEL, RankGrid(pcp_size=2), rates, [999, 999], WORDS).host == pytest.approx(step.host - 4e-6)
    assert step.seconds == pytest.approx(step.products + step.attention + step.links + step.host)


def test_with_a_device_the_longer_of_it_and_its_host_counts():
    step = StepSeconds(1.0, 2.0, 3.0, {"tp": 0.4, "dcp": 0.1})
    assert step.seconds == 6.5 and step.limit == "host" and step.busiest_axis == "tp"
    assert (step + step).seconds == step.times(2).seconds == 13
    assert replace(step, host_overlaps=True).seconds == 3.5
    assert replace(step, host_overlaps=True, host=5.0).seconds == 5.0


def test_lent_ranks_decode_short_sequences_in_homes_and_one_long_one_together():
    """The choice of dcp that a phase has: nothing travels at 1, at 2 one sequence's keys are read by two ranks."""
    alone, shared = (RankGrid(pcp_size=2, dcp_size=dcp) for dcp in (1, 2))

    def seconds(grid, contexts):
        return decode_step(MODEL, grid, RATES, contexts, WORDS).seconds

    assert seconds(alone, [100] * 8) < seconds(shared, [100] * 8)
    assert seconds(alone, [400_000] + [100] * 7) > seconds(shared, [400_000] + [100] * 7)


def test_more_keys_more_rows_and_slower_rates_never_take_less():
    grids = [RankGrid(), RankGrid(2, 1, 1), RankGrid(1, 2, 1), RankGrid(1, 2, 2), RankGrid(2, 2, 4)]
    for grid in grids:
        for by_context in ([10], [1000], [50_000]), ([100], [100] * 2, [100] * 64):
            times = [decode_step(MODEL, grid, RATES, contexts).seconds for contexts in by_context]
            assert all(a <= b for a, b in pairwise(times)), (grid, times)
    one = decode_step(MODEL, grids[-1], RATES, [1000] * 8)
    for slower in (
        {"product_flops": ((1, 1e8),)},
        {"attention_flops": 1e9},
        {"memory_bandwidth": 1e8},
        {"link": Link(1e7, 1e-4)},
        {"link": Link(1e9, 1e-2)},
        {"step_s": 1.0},
        {"layer_s": 1.0},
        {"row_s": 1.0},
        {"exchange_s": 1.0},
    ):
        assert decode_step(MODEL, grids[-1], replace(RATES, **slower), [1000] * 8).seconds > one.seconds, slower


def test_the_home_with_most_to_do_is_the_one_that_counts():
    grid = RankGrid(pcp_size=2, dcp_size=1)
    assert [home.tolist() for home in deal([5, 5, 5, 100], 2)] == [[100], [5, 5, 5]]
    long_alone = decode_step(MODEL, grid, RATES, [100_000, 5, 5]).attention
    assert long_alone == decode_step(MODEL, grid, RATES, [100_000]).attention


def test_across_hosts_a_gather_crosses_once_for_the_ranks_of_a_host_and_messages_of_an_all_to_all_one_by_one():
    rates = replace(RATES, link=Link(1e30, 1e-6), network=Link(1e9, 1e-3), ranks_per_host=4)
    group = (tuple(range(8)),)
    assert rates.collective_s(group, "gather", 0, 7e9) == pytest.approx(1.0)  # 4 of 7 parts, shared by 4
    assert rates.collective_s(group, "all_to_all", 0, 7e9) == pytest.approx(4.0)
    assert rates.collective_s(group, "gather", 2, 0) == pytest.approx(2 * 3 * 1e-3)
    inside = (tuple(range(4)), tuple(range(4, 8)))
    assert rates.collective_s(inside, "gather", 2, 0) == pytest.approx(2 * 2 * 1e-6)
    # The worst group counts: one of these spans two hosts.
    assert rates.collective_s((*inside, (3, 4)), "gather", 1, 0) == pytest.approx(1e-3)


def test_tensor_parallelism_across_hosts_costs_more_than_pcp_across_them():
    """What is said of the axes: two all-reduces per layer of tp, one gather of K and V per layer of pcp."""
    rates = replace(RATES, network=Link(1e8, 1e-3), ranks_per_host=2)
    inside, across = RankGrid(tp_size=2, pcp_size=2, dcp_size=2), RankGrid(tp_size=4)
    model = replace(MODEL, num_kv_heads=4)
    for cost in (
        lambda grid: prefill(model, grid, rates, [8192], 8192).links,
        lambda grid: decode_step(model, grid, rates, [8192]).links,
    ):
        assert cost(inside) < cost(across)


def test_prefill_over_two_ranks_halves_products_and_attention_and_adds_its_gathers():
    one, two = (prefill(MODEL, RankGrid(pcp_size=n, dcp_size=n), RATES, [16_384], 2**20) for n in (1, 2))
    assert two.attention == pytest.approx(one.attention / 2, rel=1e-3)
    assert two.products == pytest.approx(one.products / 2, rel=1e-2)
    assert one.links == 0 < two.links and one.busiest_axis is None and two.busiest_axis == "pcp"


def test_prefill_in_chunks_computes_the_same_pairs_in_more_steps():
    whole, chunks = (prefill(MODEL, RankGrid(), replace(RATES, step_s=1.0), [4096], n) for n in (4096, 512))
    assert chunks.attention == pytest.approx(whole.attention)
    assert (whole.host, chunks.host) == (1.0, 8.0)
    # What was cached in earlier steps travels, or the queries do.
    grid = RankGrid(pcp_size=2, dcp_size=2)
    assert prefill(MODEL, grid, RATES, [4096], 512).links > prefill(MODEL, grid, RATES, [4096], 4096).links


def test_a_window_bounds_keys_and_pairs():
    narrow = replace(MODEL, windows=(128,) * 4)
    assert decode_step(narrow, RankGrid(), RATES, [10_000]).attention == pytest.approx(
        decode_step(MODEL, RankGrid(), RATES, [127]).attention
    )
    pairs = sum(min(p + 1, 128) for p in range(1000))
    full = sum(p + 1 for p in range(1000))
    ratio = (
        prefill(narrow, RankGrid(), RATES, [1000], 1000).attention
        / prefill(MODEL, RankGrid(), RATES, [1000], 1000).attention
    )
    assert ratio == pytest.approx(pairs / full)


def test_experts_are_read_as_far_as_rows_go_through_them():
    """One row reads its own experts, many rows all of them."""
    moe = replace(MODEL, num_experts=64, experts_per_token=2, expert_params=1_000_000)
    rates = replace(RATES, product_flops=((1, 1e30),))
    dense = decode_step(MODEL, RankGrid(), rates, [1]).products
    assert decode_step(moe, RankGrid(), rates, [1]).products - dense == pytest.approx(2e6 * 2 / 1e10)
    many = decode_step(moe, RankGrid(), rates, [1] * 4096).products
    assert many - decode_step(MODEL, RankGrid(), rates, [1] * 4096).products == pytest.approx(64e6 * 2 / 1e10)
    assert moe.active_params == MODEL.layer_params + 2_000_000


def test_latents_are_read_once_for_all_heads_in_decode_and_expanded_in_prefill():
    rates = replace(RATES, attention_flops=1e30)
    step = decode_step(MLA, RankGrid(), rates, [999])
    assert step.attention == pytest.approx(4 * 1000 * 576 * 2 / 1e10)
    # At tp=8 each rank has all of the latent to read: none of it is saved unless it is sharded.
    assert decode_step(MLA, RankGrid(tp_size=8), rates, [999]).attention == pytest.approx(step.attention)
    assert decode_step(MLA, RankGrid(tp_size=8, dcp_size=8), rates, [999]).attention == pytest.approx(
        step.attention / 8
    )
    work = PrefillWork.of([1024], [0], 2)
    split = prefill_step(MLA, RankGrid(pcp_size=2, dcp_size=2), RATES, work)
    plain = prefill_step(replace(MLA, expanded_head=None), RankGrid(pcp_size=2, dcp_size=2), RATES, work)
    assert split.products > plain.products, "the other rank's tokens are expanded here, too"


def test_arrays_of_contexts_are_as_good_as_lists():
    grid = RankGrid(pcp_size=2, dcp_size=2)
    assert decode_step(MODEL, grid, RATES, np.array([5, 7])) == decode_step(MODEL, grid, RATES, [5, 7])
