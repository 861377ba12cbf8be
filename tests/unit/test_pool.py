import pytest

from cpinfer.layout.pool import BlockPool


def test_blocks_come_lowest_first_and_ascending():
    pool = BlockPool(6)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(3) == [2, 3, 4]
    assert pool.num_free == 1


def test_a_run_of_neighbours_is_preferred_to_lower_blocks():
    pool = BlockPool(8)
    first, hole, _ = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    pool.free(hole)
    assert first == [0]
    assert pool.allocate(3) == [3, 4, 5]
    assert pool.allocate(1) == [1]


def test_scattered_blocks_are_used_when_there_is_no_run():
    pool = BlockPool(5)
    pool.allocate(5)
    pool.free([4, 0, 2])
    assert pool.allocate(2) == [0, 2]


def test_freed_blocks_are_handed_out_in_the_same_order_whatever_order_they_came_back_in():
    pools = [BlockPool(6), BlockPool(6)]
    for pool, order in zip(pools, ([5, 1, 3], [1, 3, 5]), strict=True):
        pool.allocate(6)
        pool.free(order)
    assert pools[0].allocate(3) == pools[1].allocate(3) == [1, 3, 5]


def test_nothing_is_allocated_when_too_little_is_free():
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="4 blocks wanted, 3 of 3 are free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_zero_blocks_are_nothing_and_a_negative_number_is_refused():
    pool = BlockPool(3)
    assert pool.allocate(0) == []
    with pytest.raises(ValueError, match="-1 blocks wanted"):
        pool.allocate(-1)
    assert pool.num_free == 3
    assert BlockPool(0).allocate(0) == []


@pytest.mark.parametrize("blocks", [[0, 0], [3], [-1]], ids=["twice", "never handed out", "not a block"])
def test_a_block_that_is_not_in_use_cannot_be_freed_and_nothing_leaks(blocks):
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(ValueError, match="is not in use"):
        pool.free(blocks)
    pool.check_integrity()


def test_integrity_check_finds_a_lost_block_and_one_that_is_both_free_and_used():
    lost, twice = BlockPool(4), BlockPool(4)
    lost._free.remove(2)
    with pytest.raises(ValueError, match=r"lost \[2\]"):
        lost.check_integrity()
    twice._used.add(3)
    with pytest.raises(ValueError, match=r"both free and used \[3\]"):
        twice.check_integrity()
