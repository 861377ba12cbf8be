"""Places for states of sequences: dealt to the rank with the fewest, given back, never lost or held twice."""

import pytest

from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.state_pool import StatePool, StateSlot
from cpinfer.layout.shards import KVSharding


def test_sequences_are_dealt_over_ranks_evenly_and_take_the_lowest_slot():
    pool = StatePool(2, 3)
    taken = [pool.take() for _ in range(5)]
    assert taken == [StateSlot(0, 0), StateSlot(1, 0), StateSlot(0, 1), StateSlot(1, 1), StateSlot(0, 2)]
    pool.release(StateSlot(0, 1))
    pool.release(StateSlot(0, 0))
    assert pool.take() == StateSlot(0, 0), "rank 0 has fewest now"
    assert pool.num_free == 2


def test_a_pool_without_a_free_slot_gives_none():
    pool = StatePool(1, 1)
    pool.take()
    with pytest.raises(ValueError, match="no slot"):
        pool.take()


@pytest.mark.parametrize(
    "held", [[], [StateSlot(0, 0), StateSlot(0, 0)], [StateSlot(0, 0), StateSlot(0, 1)], [StateSlot(1, 0)]]
)
def test_a_slot_that_is_lost_or_held_twice_is_told(held):
    pool = StatePool(1, 2)
    pool.check_integrity([])
    assert pool.take() == StateSlot(0, 0)
    pool.check_integrity([StateSlot(0, 0)])
    with pytest.raises(ValueError, match="lost, or held twice"):
        pool.check_integrity(held)


def test_a_home_has_room_where_blocks_and_states_are_free_and_is_emptied_of_both():
    home = KVHome(4, KVSharding(1, 4, 4), enable_prefix_caching=False, states=StatePool(1, 2))
    assert home.has(4, num_states=2)
    assert not home.has(4, num_states=3)
    assert not home.has(5, num_states=1)
    state = home.take_state()
    assert home.has(4) and not home.has(4, num_states=2)
    assert home.emptied().has(4, num_states=2)
    blocks = home.take(2)
    home.check_integrity(blocks, {}, [state])
    home.release(blocks, state)
    assert home.has(4, num_states=2)


def test_a_home_without_states_has_room_for_any_number_of_them():
    home = KVHome(4, KVSharding(1, 4, 4), enable_prefix_caching=False)
    assert home.has(4, num_states=1000)
    assert home.take_state() is None
