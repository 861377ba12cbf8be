"""Runs of free blocks, found as a walk over all blocks would find them."""

import random

import pytest

from cpinfer.kv_cache.free_block_tree import FreeBlockTree
from line_count import lines_run


def walked(free, length, start):
    """The oracle: the first place from `start` on where `length` neighbours are free."""
    return next((i for i in range(start, len(free) - length + 1) if all(free[i : i + length])), None)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 8, 13, 16, 17])
def test_the_first_run_from_any_place_is_the_one_that_a_walk_finds(num_blocks):
    chance = random.Random(num_blocks)
    runs, free = FreeBlockTree(num_blocks), [1] * num_blocks
    for _ in range(60):
        wanted = chance.randint(0, 1)
        blocks = [block for block in range(num_blocks) if chance.random() < 0.4]
        (runs.give if wanted else runs.take)(blocks)
        for block in blocks:
            free[block] = wanted
        assert runs.flags() == free and [runs.is_free(block) for block in range(num_blocks)] == [f == 1 for f in free]
        for length in range(1, num_blocks + 1):
            for start in range(num_blocks):
                assert runs.first(length, start) == walked(free, length, start)


def test_nothing_is_free_outside_of_the_blocks():
    runs = FreeBlockTree(5)
    assert not runs.is_free(-1) and not runs.is_free(5)
    assert runs.first(5) == 0 and runs.first(6) is None and runs.first(2, 4) is None
    assert FreeBlockTree(0).first(1) is None and FreeBlockTree(0).flags() == []


def test_a_search_costs_by_the_depth_of_the_tree_however_many_runs_there_are():
    """Every second block is taken: a list of runs would be walked from end to end."""

    def cost(num_blocks):
        runs = FreeBlockTree(num_blocks)
        runs.take(range(0, num_blocks - 1, 2))
        runs.first(2)  # the tree learns of what was taken
        before = lines_run(lambda: runs.first(2))
        given = lines_run(lambda: runs.give([num_blocks - 2]))
        return before + given + lines_run(lambda: runs.first(2)), runs.first(2)

    small, large = 1 << 10, 1 << 14
    assert (cost(small)[1], cost(large)[1]) == (small - 3, large - 3)
    assert cost(large)[0] <= 1.6 * cost(small)[0]


def test_what_changes_between_searches_goes_up_the_tree_at_once():
    """So neighbours that are taken one after another share their way up."""

    def cost(num_changes):
        runs = FreeBlockTree(1 << 12)
        for block in range(num_changes):
            runs.take([block])
        return lines_run(lambda: runs.first(2))

    assert cost(1024) <= 128 * cost(1), "alone each would go up all twelve levels: 1,024 times the cost of one"
