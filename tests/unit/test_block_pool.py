import pytest

from cpinfer.kv_cache.block_pool import BlockPool
from line_count import lines_run


def test_blocks_come_lowest_first_and_ascending():
    pool = BlockPool(6)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(3) == [2, 3, 4]
    assert pool.num_free == 1


def test_a_run_of_neighbours_is_preferred_to_lower_blocks():
    pool = BlockPool(8)
    first, hole, _ = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    pool.release(hole)
    assert first == [0]
    assert pool.allocate(3) == [3, 4, 5]
    assert pool.allocate(3) == [1, 6, 7]  # no run is left that holds three


def test_scattered_blocks_are_used_when_there_is_no_run():
    pool = BlockPool(5)
    pool.allocate(5)
    pool.release([4, 0, 2])
    assert pool.allocate(2) == [0, 2]


def test_freed_blocks_are_handed_out_in_the_same_order_whatever_order_they_came_back_in():
    pools = [BlockPool(6), BlockPool(6)]
    for pool, order in zip(pools, ([5, 1, 3], [1, 3, 5]), strict=True):
        pool.allocate(6)
        pool.release(order)
    assert pools[0].allocate(3) == pools[1].allocate(3) == [1, 3, 5]


def test_sequences_placed_with_room_grow_in_runs():
    """The drawn example: a, then b, of 2 blocks with room for 4; a's third block goes behind its second."""
    pool = BlockPool(10)
    a, b = pool.allocate(2, room=4), pool.allocate(2, room=4)
    assert (a, b) == ([0, 1], [4, 5])
    assert pool.allocate(1, after=a[-1]) == [2]
    assert pool.allocate(2, after=b[-1]) == [6, 7]


def test_a_sequence_is_placed_behind_the_room_of_the_last_one_going_round_once():
    pool = BlockPool(10)
    assert [pool.allocate(1, room=3) for _ in range(3)] == [[0], [3], [6]]
    pool.release([0])
    assert pool.allocate(1, room=3) == [0]  # from 9 on there is room for one
    assert pool.allocate(1, room=3) == [7]  # from 3 on, [4, 6) is too short
    assert pool.allocate(1, room=3) == [1]  # no run of three is left: the first that holds the block


def test_room_is_a_wish_and_not_a_condition():
    pool = BlockPool(4)
    assert pool.allocate(3, room=100) == [0, 1, 2]
    assert pool.allocate(1, room=100) == [3]


def test_growth_takes_what_is_free_right_behind_and_the_rest_elsewhere():
    pool = BlockPool(8)
    a, _, c = pool.allocate(1), pool.allocate(3), pool.allocate(1)
    pool.release([1, 2])
    assert (a, c) == ([0], [4])
    assert pool.allocate(3, after=0) == [1, 2, 5]
    assert pool.allocate(1, after=0) == [6]  # the one behind is taken
    assert pool.allocate(1, after=7) == [7]  # behind the last block is nothing
    assert pool.num_free == 0


def test_nothing_is_allocated_when_too_little_is_free():
    pool = BlockPool(3)
    for after in (None, 0):
        with pytest.raises(ValueError, match="4 blocks wanted, 3 of 3 are free"):
            pool.allocate(4, after=after)
    assert pool.num_free == 3


def test_zero_blocks_are_nothing_and_a_negative_number_is_refused():
    pool = BlockPool(3)
    assert pool.allocate(0) == pool.allocate(0, room=2, after=1) == []
    with pytest.raises(ValueError, match="-1 blocks wanted"):
        pool.allocate(-1)
    assert pool.num_free == 3
    assert BlockPool(0).allocate(0) == []


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.share(blocks[:1])
    assert [pool.refs(block) for block in range(4)] == [3, 2, 0, 0]
    pool.release(blocks)
    assert (pool.refs(0), pool.refs(1), pool.num_free) == (2, 1, 2)
    pool.release(blocks)
    assert (pool.refs(0), pool.refs(1), pool.num_free) == (1, 0, 3)
    pool.release([0])
    assert pool.num_free == 4
    pool.check_integrity([])


def test_a_block_may_be_named_twice_when_both_references_are_the_callers():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.share([block, block])
    assert pool.refs(block) == 3
    pool.release([block, block, block])
    assert pool.num_free == 3


@pytest.mark.parametrize("blocks", [[0, 0], [3], [-1], [4], [0, 3]], ids=str)
def test_a_block_that_is_not_in_use_cannot_be_released_and_nothing_changes(blocks):
    """Named twice with one reference, never handed out, not a block, and a good one beside a bad one."""
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(ValueError, match="is not in use"):
        pool.release(blocks)
    assert pool.num_free == 2
    pool.check_integrity([0, 1])


@pytest.mark.parametrize("blocks", [[3], [-1], [4], [0, 3]], ids=str)
def test_a_free_block_cannot_be_shared_and_nothing_changes(blocks):
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(ValueError, match="is not in use"):
        pool.share(blocks)
    pool.check_integrity([0, 1])


def test_integrity_check_finds_a_leak_a_forgotten_reference_and_a_wrong_count():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.check_integrity([0, 1, 0])
    with pytest.raises(ValueError, match=r"blocks \[1\] have \[1\] references, their holders know of \[0\]"):
        pool.check_integrity([0, 0])
    with pytest.raises(ValueError, match=r"blocks \[3\] have \[0\] references, their holders know of \[1\]"):
        pool.check_integrity([0, 0, 1, 3])
    pool.num_free = 3
    with pytest.raises(ValueError, match="3 blocks counted as free"):
        pool.check_integrity([0, 0, 1])


def test_integrity_check_finds_a_free_block_that_is_not_searched():
    pool = BlockPool(4)
    pool._free.take([2])
    with pytest.raises(ValueError, match=r"blocks \[2\] are searched wrongly"):
        pool.check_integrity([])


# What the interpreter does meanwhile (finalizers of earlier tests) is not the pool's.
OWN_FILES = ("block_pool.py", "free_block_tree.py")


def test_a_call_costs_by_its_blocks_and_not_by_the_pool():
    def cost(num_blocks):
        pool = BlockPool(num_blocks)
        pool.allocate(num_blocks // 2)
        blocks = []
        taken = lines_run(lambda: blocks.extend(pool.allocate(8, room=16)), OWN_FILES)
        return taken + lines_run(lambda: pool.release(blocks), OWN_FILES)

    assert cost(1 << 14) <= 1.6 * cost(1 << 10)
