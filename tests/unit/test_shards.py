from itertools import pairwise

import numpy as np
import pytest

from cpinfer.layout.shards import KVSharding

SHARDINGS = [KVSharding(s, i, b) for s in (1, 2, 3, 4) for i in (1, 2, 3, 8, 24) for b in (1, 4, 6, 16)]


@pytest.mark.parametrize(
    "length, shards, interleave, lens",
    [
        (25, 4, 8, [8, 8, 8, 1]),
        (10, 2, 16, [10, 0]),
        (1000, 8, 16, [128, 128, 128, 128, 128, 128, 120, 112]),
        (0, 4, 8, [0, 0, 0, 0]),
        (1, 4, 1, [1, 0, 0, 0]),
    ],
)
def test_local_lengths_are_the_known_answers(length, shards, interleave, lens):
    sharding = KVSharding(shards, interleave, 16)
    assert [sharding.local_len(length, s) for s in range(shards)] == lens


def test_new_rows_see_of_shard_0_the_known_number_of_keys():
    """25 tokens of which 8 are new, 4 shards, interleave 1."""
    sharding = KVSharding(4, 1, 16)
    assert sharding.positions(25, 0).tolist() == [0, 4, 8, 12, 16, 20, 24]
    new = np.arange(17, 25)
    assert sharding.local_len(new + 1, 0).tolist() == [5, 5, 5, 6, 6, 6, 6, 7]


def test_a_rotated_owner_is_caught_by_the_known_lengths():
    sharding = KVSharding(4, 8, 16)
    rotated = np.bincount((sharding.owner(np.arange(25)) + 1) % 4, minlength=4)
    # Still a partition of the sequence into four, so nothing else would notice.
    assert rotated.sum() == 25
    assert rotated.tolist() != [8, 8, 8, 1]


def test_slots_of_the_drawn_example():
    sharding = KVSharding(num_shards=2, interleave=2, block_size=4)
    table = np.array([7, 3])
    assert sharding.slots(table, np.arange(10), 0).tolist() == [28, 29, -1, -1, 30, 31, -1, -1, 12, 13]
    assert sharding.slots(table, np.arange(10), 1).tolist() == [-1, -1, 28, 29, -1, -1, 30, 31, -1, -1]


def test_slots_of_no_positions_and_of_others_tokens_need_no_block_table():
    sharding = KVSharding(num_shards=2, interleave=16, block_size=16)
    empty = np.empty(0, dtype=np.int64)
    assert sharding.slots(empty, empty, 0).tolist() == []
    assert sharding.slots(empty, np.arange(10), 1).tolist() == [-1] * 10


def test_a_token_beyond_its_block_table_is_an_error_not_a_wrong_slot():
    with pytest.raises(IndexError):
        KVSharding(1, 4, 4).slots(np.array([5]), np.array([4]), 0)


def test_local_len_of_an_array_equals_that_of_its_items():
    for sharding in SHARDINGS:
        lengths = np.arange(60)
        for s in range(sharding.num_shards):
            assert sharding.local_len(lengths, s).tolist() == [sharding.local_len(int(n), s) for n in lengths]


def test_blocks_wanted_are_the_fewest_that_hold_the_longest_shard():
    for sharding in SHARDINGS:
        for length in range(80):
            longest = max(sharding.local_len(length, s) for s in range(sharding.num_shards))
            n = sharding.num_blocks(length)
            assert n * sharding.block_size >= longest > (n - 1) * sharding.block_size


def test_a_run_of_prefix_units_fills_whole_blocks_equally_on_every_shard():
    for sharding in SHARDINGS:
        unit = sharding.prefix_unit
        for end in range(unit, 4 * unit, unit):
            lens = {sharding.local_len(end, s) for s in range(sharding.num_shards)}
            assert lens == {end // sharding.num_shards}
            assert lens.pop() % sharding.block_size == 0
        if sharding.num_shards > 1:  # Nothing shorter does; one shard alone would be content with a block.
            for end in range(1, unit):
                lens = {sharding.local_len(end, s) for s in range(sharding.num_shards)}
                assert len(lens) > 1 or lens.pop() % sharding.block_size


def test_imbalance_is_at_most_one_interleave():
    for sharding in SHARDINGS:
        for length in range(100):
            lens = [sharding.local_len(length, s) for s in range(sharding.num_shards)]
            assert all(0 <= a - b <= sharding.interleave for a, b in pairwise(lens))
            assert lens[0] - lens[-1] <= sharding.interleave


@pytest.mark.parametrize("window", [1, 2, 3, 7, 16, 50, 1000])
def test_a_block_is_dead_iff_no_shard_holds_in_it_a_position_that_a_later_query_sees(window):
    """Brute force: the query at `length` sees down to `length - window + 1`, those after it less."""
    for sharding in SHARDINGS:
        span = sharding.interleave * sharding.num_shards + sharding.block_size * sharding.num_shards
        for length in range(0, 90, 1 if sharding.num_shards * sharding.interleave < 10 else 7):
            later = np.arange(max(0, length - window + 1), length + span + 1)
            # Whoever owns it: block ids are those of all shards. Block 0 is looked at by new tokens at the latest.
            alive = set((sharding.local_index(later) // sharding.block_size).tolist())
            dead = sharding.num_dead_blocks(length, window)
            assert all(block not in alive for block in range(dead))
            assert dead in alive, "the next block is still needed"


def test_known_blocks_die_behind_a_window():
    """One shard, blocks of 4, a window of 4: the query at 9 sees 6 to 9, so of 0-3, 4-7, 8- the first is dead."""
    sharding = KVSharding(1, 4, 4)
    assert [sharding.num_dead_blocks(n, 4) for n in range(12)] == [0] * 7 + [1] * 4 + [2]
    # Two shards, a token a card: block 0 holds positions 0 to 7, so a query has to be at 11 to see none of them.
    sharding = KVSharding(2, 1, 4)
    assert [sharding.num_dead_blocks(n, 4) for n in (10, 11, 18, 19)] == [0, 1, 1, 2]


@pytest.mark.parametrize("field", ["num_shards", "interleave", "block_size"])
def test_a_size_below_one_is_refused_by_name(field):
    sizes = {"num_shards": 1, "interleave": 1, "block_size": 1, field: 0}
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        KVSharding(**sizes)
