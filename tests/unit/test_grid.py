from itertools import chain

import pytest

from cpinfer.layout.grid import RankGrid, grid_errors, legal_dcp_sizes

# The design's known answers: (tp, pcp, dcp), then groups of tp, pcp and dcp, the last in shard order.
KNOWN = {
    (2, 2, 2): (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 2), (1, 3))),
    (2, 2, 4): (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 2, 1, 3),)),
    (4, 2, 2): (
        ((0, 1, 2, 3), (4, 5, 6, 7)),
        ((0, 4), (1, 5), (2, 6), (3, 7)),
        ((0, 4), (1, 5), (2, 6), (3, 7)),
    ),
    (4, 2, 4): (
        ((0, 1, 2, 3), (4, 5, 6, 7)),
        ((0, 4), (1, 5), (2, 6), (3, 7)),
        ((0, 4, 1, 5), (2, 6, 3, 7)),
    ),
    (8, 1, 2): (
        (tuple(range(8)),),
        tuple((r,) for r in range(8)),
        ((0, 1), (2, 3), (4, 5), (6, 7)),
    ),
}
ALL_GRIDS = [
    RankGrid(tp, pcp, dcp, dp)
    for tp in range(1, 9)
    for pcp in range(1, 9)
    for dp in (1, 2)
    if tp * pcp <= 16
    for dcp in legal_dcp_sizes(tp, pcp)
]


def test_a_job_lends_its_replicas_to_prefill_and_keeps_the_rest_as_dp():
    assert RankGrid.lending(2, 4) == RankGrid(2, 4, 4, 1)
    assert RankGrid.lending(2, 4, pcp_size=2) == RankGrid(2, 2, 2, 2)
    assert RankGrid.lending(1, 4, pcp_size=2, dcp_size=1) == RankGrid(1, 2, 1, 2)
    with pytest.raises(ValueError, match="pcp=3 does not divide the job's 4 replica"):
        RankGrid.lending(2, 4, pcp_size=3)


@pytest.mark.parametrize("sizes", KNOWN, ids=str)
def test_groups_are_the_known_answers(sizes):
    grid = RankGrid(*sizes)
    assert (grid.tp_groups, grid.pcp_groups, grid.dcp_groups) == KNOWN[sizes]


def test_shard_of_a_rank_is_its_place_in_the_group_not_its_place_among_sorted_ranks():
    grid = RankGrid(tp_size=2, pcp_size=2, dcp_size=4)
    assert [grid.kv_shard(rank) for rank in (0, 2, 1, 3)] == [0, 1, 2, 3]
    (group,) = grid.dcp_groups
    # What torch would do to the same group. If the two agreed, this layout could not tell a sorted group from ours.
    assert sorted(group) != list(group)


@pytest.mark.parametrize("sizes", KNOWN, ids=str)
def test_a_rotated_shard_index_keeps_every_structural_law_and_only_known_answers_catch_it(sizes):
    groups = RankGrid(*sizes).dcp_groups
    rotated = tuple(group[1:] + group[:1] for group in groups)
    # Same ranks, same sizes, every shard once per group: no parity test can see the rotation ...
    assert [set(group) for group in rotated] == [set(group) for group in groups]
    # ... but the printed answers do.
    assert rotated != KNOWN[sizes][2]


def test_tp_is_the_fastest_axis_and_dp_the_slowest():
    grid = RankGrid(tp_size=2, pcp_size=3, dcp_size=3, dp_size=2)
    assert grid.coords(0) == (0, 0, 0)
    assert grid.coords(1) == (0, 0, 1)
    assert grid.coords(2) == (0, 1, 0)
    assert grid.coords(6) == (1, 0, 0)
    assert grid.world_size == 12


@pytest.mark.parametrize("rank", [-1, 4])
def test_coords_of_a_rank_outside_the_grid_are_refused(rank):
    with pytest.raises(ValueError, match="outside the grid of 4 ranks"):
        RankGrid(2, 2, 2).coords(rank)


def test_rank_and_coords_are_inverse_and_every_axis_partitions_the_world():
    for grid in ALL_GRIDS:
        assert [grid.rank(*grid.coords(rank)) for rank in range(grid.world_size)] == list(range(grid.world_size))
        sizes = {
            grid.tp_groups: grid.tp_size,
            grid.pcp_groups: grid.pcp_size,
            grid.dcp_groups: grid.dcp_size,
            grid.replica_groups: grid.ranks_per_replica,
        }
        for groups, size in sizes.items():
            assert sorted(chain(*groups)) == list(range(grid.world_size))
            assert {len(group) for group in groups} == {size}
            # Replicas never talk to each other.
            assert all(len({grid.coords(rank).dp_rank for rank in group}) == 1 for group in groups)


def test_a_home_holds_every_shard_and_a_dcp_group_stays_in_one_home():
    for grid in ALL_GRIDS:
        for group in grid.dcp_groups:
            assert len({grid.home(rank) for rank in group}) == 1
            assert [grid.kv_shard(rank) for rank in group] == list(range(grid.dcp_size))
            # A group covers whole columns of its home, so each of its pcp ranks is in it equally often.
            pcp_ranks = [grid.coords(rank).pcp_rank for rank in group]
            assert len(set(pcp_ranks)) == grid.row_ranks
            assert len({grid.coords(rank).tp_rank for rank in group}) == grid.columns_per_dcp_group
        assert {grid.home(rank) for rank in range(grid.world_size)} == set(range(grid.num_homes))


def test_two_homes_when_dcp_is_half_of_pcp():
    grid = RankGrid(tp_size=1, pcp_size=4, dcp_size=2)
    assert grid.dcp_groups == ((0, 1), (2, 3))
    assert [grid.home(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert (grid.num_homes, grid.row_ranks, grid.columns_per_dcp_group) == (2, 2, 1)


def test_dcp_divides_pcp_or_is_a_multiple_of_it_that_divides_the_replica():
    for tp in range(1, 9):
        for pcp in range(1, 9):
            legal = {s for s in range(1, 65) if pcp % s == 0 or (s % pcp == 0 and (pcp * tp) % s == 0)}
            assert set(legal_dcp_sizes(tp, pcp)) == legal
            for dcp in range(1, pcp * tp + 2):
                assert bool(grid_errors(tp, pcp, dcp)) == (dcp not in legal)


def test_an_illegal_dcp_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"dcp=3 does not fit tp=4, pcp=2.*Use one of 1, 2, 4, 8\."):
        RankGrid(tp_size=4, pcp_size=2, dcp_size=3)


@pytest.mark.parametrize("axis", ["tp_size", "pcp_size", "dcp_size", "dp_size"])
@pytest.mark.parametrize("size", [0, -2])
def test_a_size_below_one_is_refused_by_name(axis, size):
    with pytest.raises(ValueError, match=f"{axis.removesuffix('_size')}={size} is not a positive number of ranks"):
        RankGrid(**{axis: size})
