from itertools import chain

import pytest

from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.heads import HeadPlacement, head_errors

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
