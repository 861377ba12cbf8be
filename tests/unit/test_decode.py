import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.layout.decode import assign_rows, plan_decode, rows_in_window
from cpinfer.layout.shards import KVSharding

SHARDING = KVSharding(num_shards=2, interleave=2, block_size=4)


def plan(positions, tables, pcp_rank=0, shard=0, pcp_size=2):
    return plan_decode(positions, tables, SHARDING, pcp_size=pcp_size, pcp_rank=pcp_rank, shard=shard)


def test_the_drawn_example_deals_five_rows_over_two_ranks():
    tables = [[i] for i in range(5)]
    plans = [plan([0, 1, 2, 3, 4], tables, pcp_rank=r, shard=r) for r in range(2)]
    assert [p.own.tolist() for p in plans] == [[0, 1, 2], [3, 4, -1]]
    assert [p.positions.tolist() for p in plans] == [[0, 1, 2], [3, 4, 0]]
    for p in plans:
        assert p.gathered.tolist() == [0, 1, 2, 3, 4, -1]


@pytest.mark.parametrize("num_rows", range(1, 12))
@pytest.mark.parametrize("pcp", [1, 2, 3, 8])
def test_every_rank_takes_as_many_neighbours_and_padding_comes_last(num_rows, pcp):
    assigned = assign_rows(num_rows, pcp)
    assert len(assigned) == pcp * -(-num_rows // pcp)
    assert assigned[:num_rows].tolist() == list(range(num_rows)) and (assigned[num_rows:] == -1).all()


def test_the_new_token_is_among_the_keys_its_query_sees():
    # Position 4 is owned by shard 0, whose third token it is: local 0 1 4 -> slots 12 13 14 of block 3.
    owner, other = plan([4], [[3]], shard=0), plan([4], [[3]], shard=1)
    assert owner.write_slots.tolist() == [14]
    assert owner.rows.slots(0).tolist() == [12, 13, 14]
    assert other.write_slots.tolist() == []
    assert other.rows.slots(0).tolist() == [12, 13]


def test_a_shard_without_keys_yet_has_an_empty_row():
    p = plan([1], [[3]], shard=1)
    assert p.rows.kv_hi.tolist() == [0, 0]
    assert p.rows.block_ids.tolist() == []


def test_a_padding_row_sees_nothing_and_writes_nothing():
    for shard in range(2):
        p = plan([5, 9, 7], [[0], [1, 2], [3]], pcp_rank=1, shard=shard)
        (padding,) = np.flatnonzero(p.gathered < 0)
        assert p.rows.kv_hi[padding] == 0
        assert padding not in p.write_src
        assert p.own.tolist() == [2, -1]
        assert p.positions.tolist() == [7, 0]


def test_a_decode_row_is_one_query_without_a_mask():
    p = plan([5, 9, 7], [[0], [1, 2], [3]])
    assert p.rows.q_lens.tolist() == [1, 1, 1, 1]
    assert not p.rows.causal


def test_writes_go_to_the_slots_of_the_row_they_come_from():
    positions, tables = [5, 9, 7, 8], [[0], [1, 2], [3], [4, 5]]
    for shard in range(2):
        p = plan(positions, tables, shard=shard)
        for src, slot in zip(p.write_src, p.write_slots, strict=True):
            row = p.gathered[src]
            assert SHARDING.slots(np.array(tables[row]), np.array([positions[row]]), shard).tolist() == [slot]


def test_a_step_without_sequences_is_refused():
    with pytest.raises(ValueError, match="at least one sequence"):
        plan([], [])


@pytest.mark.parametrize("shard", [0, 1])
def test_a_block_table_that_does_not_cover_the_new_token_is_an_error_on_every_shard(shard):
    # 10 tokens on each shard by then, in blocks of 4: three are needed.
    with pytest.raises((IndexError, ValueError)):
        plan([19], [[0, 1]], shard=shard)


# --- layers with a window ---

LAW = settings(max_examples=150, deadline=None, derandomize=True)


def windowed(positions, tables, sharding, window, pcp_size=1):
    """For each sequence the (position, shard) pairs that its query sees in a layer with `window`, over all shards."""
    seen = [[] for _ in positions]
    for shard in range(sharding.num_shards):
        p = plan_decode(positions, tables, sharding, pcp_size=pcp_size, pcp_rank=0, shard=shard)
        rows = rows_in_window(p, sharding, shard, window)
        assert not rows.causal and rows.window is None and rows.q_lens.tolist() == p.rows.q_lens.tolist()
        assert (rows.block_ids >= 0).all(), "a block that was given back is looked up"
        for row, i in enumerate(p.gathered.tolist()):
            slots = rows.slots(row).tolist()
            if i < 0:
                assert slots == [], "padding sees nothing"
                continue
            # Every slot of the sequence on this shard, by the position of its token.
            all_positions = np.arange(positions[i] + 1)
            slot_of = sharding.slots(np.array(tables[i]), all_positions, shard)
            position_of = {int(slot): int(at) for at, slot in zip(all_positions, slot_of, strict=True) if slot >= 0}
            found = [position_of[slot] for slot in slots]
            assert found == sorted(found)
            seen[i] += [(at, shard) for at in found]
    return seen


@st.composite
def running(draw):
    """(positions, tables, sharding, window): any shards, any cards, tables that lack what no window reaches."""
    sharding = KVSharding(draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 6)))
    window = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 40, 1000]))
    positions, tables, first = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4)), [], 0
    for at in positions:
        n = sharding.num_blocks(at + 1)
        table = list(draw(st.permutations(range(first, first + n))))
        first += n
        dead = sharding.num_dead_blocks(at, window)
        tables.append([-1] * dead + table[dead:])
    return positions, tables, sharding, window


@LAW
@given(running(), st.integers(1, 3))
def test_in_a_window_the_shards_together_see_the_last_positions_each_from_its_owner(step, pcp_size):
    positions, tables, sharding, window = step
    for at, seen in zip(positions, windowed(positions, tables, sharding, window, pcp_size), strict=True):
        wanted = range(max(0, at - window + 1), at + 1)
        assert sorted(seen) == [(x, int(sharding.owner(np.array(x)))) for x in wanted]


def test_the_window_of_a_known_step():
    """Position 9 of two shards, two tokens a card: 0 1 . . 2 3 . . 4 5 on shard 0; the last five are 5 6 7 8 9."""
    seen = windowed([9], [[3, 1]], SHARDING, 5)
    assert sorted(seen[0]) == [(5, 0), (6, 1), (7, 1), (8, 0), (9, 0)]


def test_a_shard_that_holds_nothing_of_the_window_has_an_empty_row():
    p = plan([5], [[3]], shard=1, pcp_size=1)
    assert p.rows.slots(0).tolist() == [12, 13]
    rows = rows_in_window(p, SHARDING, 1, 2)
    assert rows.kv_hi.tolist() == [0] and rows.block_ids.tolist() == []


def test_a_window_off_by_one_would_be_seen():
    for other in (4, 6):
        assert windowed([9], [[3, 1]], SHARDING, other) != windowed([9], [[3, 1]], SHARDING, 5)


def test_rows_with_a_rank_of_their_own_stay_with_it():
    assert assign_rows(5, 3, ranks=[2, 0, 2, 2, 0]).tolist() == [1, 4, -1, -1, -1, -1, 0, 2, 3]
    assert assign_rows(2, 2, rows_per_rank=2, ranks=[1, 1]).tolist() == [-1, -1, 0, 1]
    with pytest.raises(ValueError, match="3 rows do not fit 2 on each of 2 ranks"):
        assign_rows(3, 2, rows_per_rank=2, ranks=[1, 1, 1])


@pytest.mark.parametrize("pcp_rank, rows", [(0, [1, -1]), (1, [0, 2])])
def test_a_plan_for_rows_with_ranks_computes_and_writes_the_rows_of_each(pcp_rank, rows):
    p = plan_decode([4, 9, 7], [[3], [1, 2], [0]], SHARDING, pcp_size=2, pcp_rank=pcp_rank, shard=0, ranks=[1, 0, 1])
    assert p.own.tolist() == rows
    assert p.gathered.tolist() == [1, -1, 0, 2]
    # Positions 4 and 9 are shard 0's, 7 is not.
    assert p.gathered[p.write_src].tolist() == [1, 0]
    assert p.rows.kv_hi.tolist() == [6, 0, 3, 4]
