from dataclasses import replace
from itertools import chain

import pytest

from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.heads import GroupHeads, HeadPlacement, head_errors

PLACEMENTS = [
    HeadPlacement(hq, hkv, tp)
    for tp in (1, 2, 3, 4, 6, 8)
    for hkv in (1, 2, 3, 4, 6, 8, 12)
    for hq in (hkv, 2 * hkv, 24 * hkv)
    if not head_errors(hq, hkv, tp)
]


def test_the_drawn_example_puts_two_kv_heads_on_four_ranks():
    heads = HeadPlacement(num_q_heads=8, num_kv_heads=2, tp_size=4)
    assert [list(heads.q_heads(t)) for t in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(heads.kv_heads(t)) for t in range(4)] == [[0], [0], [1], [1]]
    assert heads.rep == 2


def test_query_heads_are_partitioned_and_every_kv_head_is_held_rep_times():
    for heads in PLACEMENTS:
        ranks = range(heads.tp_size)
        assert list(chain(*map(heads.q_heads, ranks))) == list(range(heads.num_q_heads))
        held = list(chain(*map(heads.kv_heads, ranks)))
        assert held == sorted(held)
        assert [held.count(head) for head in range(heads.num_kv_heads)] == [heads.rep] * heads.num_kv_heads
        assert all(len(heads.kv_heads(t)) == heads.kv_heads_per_rank for t in ranks)


def test_a_rank_holds_exactly_the_kv_heads_that_its_query_heads_attend_to():
    for heads in PLACEMENTS:
        group = heads.num_q_heads // heads.num_kv_heads
        for t in range(heads.tp_size):
            assert {q // group for q in heads.q_heads(t)} == set(heads.kv_heads(t))


@pytest.mark.parametrize("pcp", [1, 2, 3])
def test_a_layout_mixes_heads_iff_some_dcp_group_holds_more_than_one_set_of_them(pcp):
    for heads in PLACEMENTS:
        for dcp in legal_dcp_sizes(heads.tp_size, pcp):
            grid = RankGrid(heads.tp_size, pcp, dcp)
            sets_per_group = [
                {heads.kv_heads(grid.coords(rank).tp_rank) for rank in group} for group in grid.dcp_groups
            ]
            assert heads.mixes_heads(grid) == any(len(sets) > 1 for sets in sets_per_group)


def test_the_layout_that_vllm_computes_garbage_on_is_known_to_mix_heads():
    heads = HeadPlacement(num_q_heads=12, num_kv_heads=2, tp_size=6)
    # Groups (0, 1) and (4, 5) are clean, (2, 3) is not: looking at the first group alone is not enough.
    assert [list(heads.kv_heads(t)) for t in range(6)] == [[0], [0], [0], [1], [1], [1]]
    assert heads.mixes_heads(RankGrid(tp_size=6, dcp_size=2))
    assert not heads.mixes_heads(RankGrid(tp_size=6, dcp_size=3))


def test_a_mixed_group_stores_the_heads_of_both_its_columns():
    """TP2 PCP2 DCP4, two KV heads: all four ranks store both."""
    heads, grid = HeadPlacement(num_q_heads=8, num_kv_heads=2, tp_size=2), RankGrid(2, 2, 4)
    first = GroupHeads(num_q_heads=4, kv_heads=(0, 1), q_per_kv=(4, 4), columns=(0, 1), own=slice(0, 1))
    assert [heads.in_group(grid, t) for t in range(2)] == [first, replace(first, own=slice(1, 2))]
    assert first.is_mixed
    assert heads.max_stored_heads(grid) == 2
    assert heads.max_stored_heads(RankGrid(2, 2, 2)) == 1


def test_only_the_middle_group_of_six_ranks_stores_both_heads():
    heads, grid = HeadPlacement(num_q_heads=12, num_kv_heads=2, tp_size=6), RankGrid(tp_size=6, dcp_size=2)
    groups = [heads.in_group(grid, t) for t in range(6)]
    assert [g.kv_heads for g in groups] == [(0,), (0,), (0, 1), (0, 1), (1,), (1,)]
    assert [g.q_per_kv for g in groups] == [(4,), (4,), (2, 2), (2, 2), (4,), (4,)]
    assert [g.columns for g in groups] == [(0,), (0,), (0, 1), (0, 1), (0,), (0,)]
    assert [g.own for g in groups] == [slice(0, 1)] * 3 + [slice(1, 2)] + [slice(0, 1)] * 2
    assert [g.is_mixed for g in groups] == [False, False, True, True, False, False]
    assert heads.max_stored_heads(grid) == 2


def test_a_group_of_three_columns_shares_its_queries_unevenly_among_two_heads():
    """TP6 DCP3, three KV heads on two tp ranks each: of head 1 each group has half the queries."""
    heads, grid = HeadPlacement(num_q_heads=12, num_kv_heads=3, tp_size=6), RankGrid(tp_size=6, dcp_size=3)
    groups = [heads.in_group(grid, t) for t in range(6)]
    assert [g.kv_heads for g in groups] == [(0, 1)] * 3 + [(1, 2)] * 3
    assert [g.q_per_kv for g in groups] == [(4, 2)] * 3 + [(2, 4)] * 3
    assert [g.columns for g in groups] == [(0, 2)] * 3 + [(0, 1)] * 3
    assert [g.own.start for g in groups] == [0, 0, 1, 0, 1, 1]


def test_a_group_of_columns_with_several_heads_each_stores_all_of_them():
    heads, grid = HeadPlacement(num_q_heads=16, num_kv_heads=8, tp_size=4), RankGrid(tp_size=4, dcp_size=2)
    groups = [heads.in_group(grid, t) for t in range(4)]
    assert [g.kv_heads for g in groups] == [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2
    assert [(g.columns, g.q_per_kv) for g in groups] == [((0, 1), (2, 2, 2, 2))] * 4
    assert [g.own for g in groups] == [slice(0, 2), slice(2, 4)] * 2


@pytest.mark.parametrize("pcp, dcp", [(1, 1), (4, 1), (4, 2), (4, 4), (1, 2), (4, 8)])
def test_an_unmixed_group_stores_what_its_ranks_compute(pcp, dcp):
    """Above dcp=pcp its columns hold the same head: two of the four ranks that have a copy."""
    heads, grid = HeadPlacement(num_q_heads=16, num_kv_heads=2, tp_size=8), RankGrid(8, pcp, dcp)
    for t in range(8):
        got = heads.in_group(grid, t)
        assert (got.kv_heads, got.columns, got.own) == (tuple(heads.kv_heads(t)), (0,), slice(0, 1))
        assert got.q_per_kv == (2 * grid.columns_per_dcp_group,)
        assert not got.is_mixed


@pytest.mark.parametrize(
    "q, kv, tp, message",
    [
        (8, 3, 1, "8 query heads do not divide over 3 KV heads"),
        (6, 2, 4, r"6 query heads do not divide over tp=4. Use a divisor of 6"),
        (24, 3, 2, r"3 KV heads do not fit tp=2: one must divide the other"),
        (0, 1, 1, "both must be at least 1"),
        (4, 0, 2, "both must be at least 1"),
    ],
)
def test_heads_that_cannot_be_dealt_are_refused_with_their_numbers(q, kv, tp, message):
    with pytest.raises(ValueError, match=message):
        HeadPlacement(q, kv, tp)
