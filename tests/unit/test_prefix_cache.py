"""Remembered prefixes: found by their tokens, shared while in use, forgotten least recently used first."""

from itertools import count

import numpy as np
import pytest

from cpinfer.kv_cache.block_pool import BlockPool
from cpinfer.kv_cache.expert_record import ExpertRecord
from cpinfer.kv_cache.prefix_cache import PrefixCache, extend_keys
from cpinfer.layout.shards import KVSharding
from line_count import lines_run

SHARDING = KVSharding(num_shards=1, interleave=4, block_size=4)
FORKED = KVSharding(1, 6, 2)
A, B = list(range(100, 140)), list(range(200, 240))


def num_evictable(cache):
    return next(n for n in count() if not cache.can_evict(n + 1))


def release(pool, cache, blocks):
    """As a sequence gives its blocks back."""
    pool.release(blocks)
    cache.note_release(blocks)
    cache.check_integrity({})


def make_cache(num_blocks=20, sharding=SHARDING, enabled=True):
    pool = BlockPool(num_blocks)
    return pool, PrefixCache(pool, sharding, is_enabled=enabled)


def keys_of(tokens, sharding=SHARDING):
    keys = []
    extend_keys(keys, list(tokens), sharding.prefix_unit)
    return keys


def compute(pool, cache, tokens, sharding=SHARDING):
    """Blocks of a sequence that computed all of `tokens`, which are then remembered."""
    blocks = pool.allocate(sharding.num_blocks(len(tokens)))
    cache.insert(keys_of(tokens, sharding), blocks)
    return blocks


def remember(pool, cache, tokens, sharding=SHARDING):
    """The same of a sequence that has ended."""
    blocks = compute(pool, cache, tokens, sharding)
    release(pool, cache, blocks)
    return blocks


def match(pool, cache, tokens, max_tokens=10**6, sharding=SHARDING):
    """What matches, without keeping the reference."""
    blocks = cache.match(keys_of(tokens[:max_tokens], sharding))
    release(pool, cache, blocks)
    return blocks


def check(pool, cache, *sequences):
    """Nobody but these sequences and the cache refers to a block."""
    pool.check_integrity([*cache.references(), *(block for blocks in sequences for block in blocks)])


@pytest.mark.parametrize(
    "sharding, unit, blocks_per_unit",
    [
        (KVSharding(1, 4, 4), 4, 1),
        (KVSharding(1, 1, 4), 4, 1),
        (KVSharding(2, 4, 4), 8, 1),
        (KVSharding(2, 1, 4), 8, 1),
        (KVSharding(1, 8, 4), 8, 2),
        (KVSharding(3, 6, 4), 36, 3),
        (KVSharding(4, 16, 16), 64, 1),
    ],
    ids=str,
)
def test_whole_units_of_lcm_of_interleave_and_block_times_shards_are_remembered(sharding, unit, blocks_per_unit):
    tokens = list(range(3 * unit + unit // 2))
    pool, cache = make_cache(40, sharding)
    blocks = compute(pool, cache, tokens, sharding)
    assert len(cache) == 3
    for length in range(len(tokens) + 1):
        found = match(pool, cache, tokens[:length], sharding=sharding)
        assert found == blocks[: length // unit * blocks_per_unit]
    check(pool, cache, blocks)


def test_what_is_found_lies_where_the_sharding_says():
    """Every token of a found prefix has its slot within the blocks that are found, on its shard, and they are full."""
    for sharding in (KVSharding(2, 1, 4), KVSharding(3, 6, 4), KVSharding(2, 8, 4)):
        n = 2 * sharding.prefix_unit
        pool, cache = make_cache(40, sharding)
        remember(pool, cache, list(range(n + 1)), sharding)
        found = match(pool, cache, list(range(n)), sharding=sharding)
        assert sharding.num_blocks(n) == sharding.num_immutable_blocks(n) == len(found)


def test_the_longest_known_prefix_within_max_tokens_is_found():
    pool, cache = make_cache()
    blocks = remember(pool, cache, A[:18])
    assert match(pool, cache, A) == blocks[:4]
    for max_tokens in range(20):
        assert match(pool, cache, A, max_tokens) == blocks[: min(max_tokens, 16) // 4]


def test_other_tokens_or_other_tokens_before_them_do_not_match():
    pool, cache = make_cache()
    blocks = remember(pool, cache, A[:12])
    assert match(pool, cache, B) == []
    assert match(pool, cache, A[4:]) == []  # known tokens at other positions
    assert match(pool, cache, B[:4] + A[4:12]) == []  # known tokens at their positions, behind others
    assert match(pool, cache, A[:4] + B[:4] + A[8:12]) == blocks[:1]
    assert match(pool, cache, [*A[:7], 0]) == blocks[:1]  # the last of a unit differs
    assert match(pool, cache, [A[1], A[0], *A[2:]]) == []


def test_tokens_of_any_size_and_kind_of_sequence_are_told_apart():
    """Keys are of the numbers: 1, 256 is not 257, 0, and a tuple is not another prefix than a list."""
    pool, cache = make_cache()
    blocks = remember(pool, cache, (1, 256, 2**40, 7))
    assert match(pool, cache, [1, 256, 2**40, 7]) == blocks
    assert match(pool, cache, [257, 0, 2**40, 7]) == match(pool, cache, [1, 256, 2**40 + 2**32, 7]) == []


def test_nothing_is_found_of_no_tokens_and_nothing_remembered_of_less_than_a_unit():
    pool, cache = make_cache()
    assert match(pool, cache, []) == match(pool, cache, A) == []
    remember(pool, cache, [])
    remember(pool, cache, A[:3])
    assert len(cache) == 0 and pool.num_free == 20


def test_a_match_is_a_reference_for_the_caller_and_the_cache_keeps_its_own():
    pool, cache = make_cache()
    blocks = compute(pool, cache, A[:8])
    assert [pool.refs(block) for block in blocks] == [2, 2]
    found = cache.match(keys_of(A[:4]))
    assert [pool.refs(block) for block in blocks] == [3, 2]
    check(pool, cache, blocks, found)
    release(pool, cache, blocks)
    release(pool, cache, found)
    assert [pool.refs(block) for block in blocks] == [1, 1] and pool.num_free == 18
    check(pool, cache)


def test_what_is_known_is_not_remembered_twice():
    """A second sequence that computed the same elsewhere keeps its blocks for itself; its new units are added."""
    pool, cache = make_cache()
    first = compute(pool, cache, A[:8])
    second = compute(pool, cache, A[:12])
    assert len(cache) == 3
    assert [pool.refs(block) for block in first + second] == [2, 2, 1, 1, 2]
    assert match(pool, cache, A[:12]) == [*first, second[2]]
    check(pool, cache, first, second)


def test_blocks_in_use_are_not_evictable():
    pool, cache = make_cache(num_blocks=4)
    blocks = compute(pool, cache, A[:12])
    assert num_evictable(cache) == 0
    cache.evict(4)
    assert len(cache) == 3 and pool.num_free == 1
    release(pool, cache, blocks[2:])
    assert num_evictable(cache) == 1
    cache.evict(4)
    assert len(cache) == 2 and pool.num_free == 2 and num_evictable(cache) == 0
    assert match(pool, cache, A) == blocks[:2]
    check(pool, cache, blocks[:2])


def test_no_more_is_forgotten_than_is_asked_for():
    pool, cache = make_cache(num_blocks=6)
    remember(pool, cache, A[:16])
    cache.evict(2)
    assert len(cache) == 4  # so many were free
    cache.evict(4)
    assert (len(cache), pool.num_free, num_evictable(cache)) == (2, 4, 2)
    cache.evict(100)
    assert (len(cache), pool.num_free, num_evictable(cache)) == (0, 6, 0)


def test_the_least_recently_used_goes_first():
    pool, cache = make_cache(num_blocks=6)
    a, _ = remember(pool, cache, A[:8]), remember(pool, cache, B[:8])
    match(pool, cache, A)
    cache.evict(4)
    assert (match(pool, cache, A), match(pool, cache, B)) == (a, [])
    remember(pool, cache, B[:8])
    release(pool, cache, compute(pool, cache, A[:8]))  # to compute it again is to use it, too
    cache.evict(4)
    assert (match(pool, cache, A), match(pool, cache, B)) == (a, [])


def test_a_prefix_goes_after_what_follows_it():
    """Without its beginning the rest could not be found, and would hold blocks for nothing."""
    pool, cache = make_cache(num_blocks=8)
    a = remember(pool, cache, A[:16])
    for left in (3, 2, 1, 0):
        cache.evict(pool.num_free + 1)
        assert match(pool, cache, A) == a[:left] and len(cache) == left


def test_a_short_match_leaves_what_follows_to_go_first():
    pool, cache = make_cache(num_blocks=9)
    a, b = remember(pool, cache, A[:12]), remember(pool, cache, B[:12])
    match(pool, cache, A, max_tokens=4)
    cache.evict(5)  # both of A's that were not used again
    assert (match(pool, cache, A), match(pool, cache, B)) == (a[:1], b)


def test_branches_share_their_stem_which_goes_last():
    pool, cache = make_cache(num_blocks=8)
    stem = remember(pool, cache, A[:4])
    left = cache.match(keys_of(A[:4]))
    left += pool.allocate(1)
    cache.insert(keys_of(A[:8]), left)
    right = cache.match(keys_of(A[:4]))
    right += pool.allocate(1)
    cache.insert(keys_of(A[:4] + B[:4]), right)
    assert len(cache) == 3 and left[0] == right[0] == stem[0]
    release(pool, cache, left)
    release(pool, cache, right)
    cache.evict(7)
    assert match(pool, cache, A) == stem and match(pool, cache, A[:4] + B) == stem
    check(pool, cache)


def forked_units():
    """(pool, cache, first sample's blocks, second's) of samples that end one unit of 3 blocks differently.

    They share the two blocks of their prompt, and each goes on in a block of its own.
    """
    sharding = FORKED
    pool, cache = make_cache(6, sharding)
    first = compute(pool, cache, A[:6], sharding)
    pool.share(first[:2])
    second = first[:2] + pool.allocate(1)
    cache.insert(keys_of(A[:4] + B[:2], sharding), second)
    assert len(cache) == 2 and [pool.refs(block) for block in (*first, second[2])] == [4, 4, 2, 2]
    return pool, cache, first, second


def test_units_with_blocks_in_common_can_all_be_evicted_once_nobody_uses_them():
    pool, cache, first, second = forked_units()
    assert num_evictable(cache) == 0
    release(pool, cache, first)
    assert num_evictable(cache) == 1
    release(pool, cache, second)
    assert num_evictable(cache) == 4
    cache.evict(3)
    assert len(cache) == 1 and pool.num_free == 3  # the first to go frees the block that is its alone
    assert match(pool, cache, A[:4] + B[:2], sharding=FORKED) == second and match(pool, cache, A, sharding=FORKED) == []
    cache.evict(6)
    assert len(cache) == 0 and pool.num_free == 6
    check(pool, cache)


def test_of_units_with_blocks_in_common_one_in_use_keeps_what_they_share_and_no_more():
    """Else what is evictable would shrink by more than what a match takes, and an admitted prompt find no blocks."""
    pool, cache, first, second = forked_units()
    release(pool, cache, second)
    assert num_evictable(cache) == 1
    cache.evict(6)
    assert pool.num_free == 3 and second[2] not in cache.references()
    assert (match(pool, cache, A, sharding=FORKED), match(pool, cache, A[:4] + B[:2], sharding=FORKED)) == (first, [])
    check(pool, cache, first)


def test_a_cache_that_is_switched_off_finds_nothing_and_keeps_nothing():
    pool, cache = make_cache(enabled=False)
    blocks = compute(pool, cache, A[:12])
    assert len(cache) == num_evictable(cache) == 0 and match(pool, cache, A) == []
    assert [pool.refs(block) for block in blocks] == [1, 1, 1]
    cache.evict(20)
    check(pool, cache, blocks)


def test_two_caches_fed_alike_decide_alike():
    """Keys are no Python hashes, which differ between processes; the order of use is the only order there is."""

    def history():
        pool, cache = make_cache(num_blocks=8)
        seen = []
        for tokens in (A[:12], B[:8], A[:4] + B[:8], B[:12]):
            known = cache.match(keys_of(tokens[:-1]))
            missing = len(tokens) // 4 - len(known)
            cache.evict(missing)
            blocks = known + pool.allocate(missing)
            cache.insert(keys_of(tokens), blocks)
            release(pool, cache, blocks)
            seen.append((tuple(blocks), sorted(cache.references()), pool.num_free))
        return seen, list(cache._units)

    assert history() == history()


def test_a_block_is_found_to_evict_without_a_walk_over_those_in_use():
    """Under a full pool this is asked for every block that a sequence grows by."""

    def cost(num_in_use):
        pool, cache = make_cache(num_in_use + 1)
        for i in range(num_in_use):
            compute(pool, cache, [i] * 4)
        remember(pool, cache, A[:4])
        assert pool.num_free == 0
        asked = lines_run(lambda: cache.can_evict(1)) + lines_run(lambda: cache.evict(1))
        assert pool.num_free == 1 and len(cache) == num_in_use
        return asked

    assert cost(400) <= 1.6 * cost(20)  # the tree over the pool is deeper


def test_the_queue_does_not_grow_with_uses_that_evict_nothing():
    pool, cache = make_cache()
    remember(pool, cache, A[:16])
    for _ in range(50):
        match(pool, cache, A)
    assert len(cache._queue) <= 2 * len(cache) + 1


def test_integrity_check_finds_what_is_idle_and_not_known_to_be():
    pool, cache = make_cache()
    blocks = compute(pool, cache, A[:8])
    cache.check_integrity({})
    pool.release(blocks)  # and nobody says so
    with pytest.raises(ValueError, match=r"blocks \[0, 1\] are counted wrongly"):
        cache.check_integrity({})
    cache.note_release(blocks)
    cache._queue.clear()
    with pytest.raises(ValueError, match="2 units would never be evicted"):
        cache.check_integrity({})


def test_what_is_announced_is_coming_until_all_who_compute_it_have_withdrawn():
    _, cache = make_cache()
    keys = keys_of(A[:12])
    assert cache.num_coming(keys) == 0
    cache.announce(keys)
    cache.announce(keys[:2])
    assert (cache.num_coming(keys), cache.num_coming(keys_of(A[:8] + B[:8])), cache.num_coming(keys_of(B))) == (3, 2, 0)
    with pytest.raises(ValueError, match="3 units are waited for in vain"):
        cache.check_integrity({})
    cache.withdraw(keys)
    assert cache.num_coming(keys) == 2
    cache.withdraw(keys[:2])
    assert cache.num_coming(keys) == 0
    cache.check_integrity({})


def test_what_is_to_be_matched_makes_no_room():
    pool, cache = make_cache()
    remember(pool, cache, A[:8])
    compute(pool, cache, B[:8])
    a, b = keys_of(A[:8]), keys_of(B[:8])
    assert (cache.num_known(keys_of(A[:12])), cache.num_known(b), cache.num_known(keys_of(A[4:8]))) == (2, 2, 0)
    assert [cache.can_evict(n) for n in (0, 2, 3)] == [True, True, False]
    assert [cache.can_evict(n, a[:1]) for n in (0, 1, 2)] == [True, True, False]
    assert [cache.can_evict(n, a) for n in (0, 1)] == [True, False]
    assert cache.can_evict(2, b), "a sequence reads them, so they were no room before"


def record_of(num_tokens, first=0):
    """Of the first tokens of a sequence: one expert each, numbered."""
    record = ExpertRecord()
    record.add(0, np.arange(first, first + num_tokens, dtype=np.int16).reshape(-1, 1, 1))
    return record


def found_by(cache, tokens, record):
    """Blocks of what is matched by one who asks for experts, and is told them."""
    keys = keys_of(tokens)
    known = keys[: cache.num_known(keys, record)]
    blocks = cache.match(known)
    cache.recall(known, record)
    return blocks


def test_who_asks_for_experts_finds_units_whose_experts_are_known_to_one_of_both():
    pool, cache = make_cache()
    blocks = pool.allocate(3)
    cache.insert(keys_of(A[:12]), blocks)
    assert found_by(cache, A[:12], None) == blocks
    for num_known, num_found in ((0, 0), (3, 0), (4, 1), (11, 2), (12, 3)):
        assert found_by(cache, A[:12], record_of(num_known)) == blocks[:num_found]
    cache.insert(keys_of(A[:8]), blocks[:2], record_of(8))  # run again, by one who asked
    for num_known, num_found in ((0, 2), (9, 2), (12, 3)):
        record = record_of(num_known, first=50)
        assert found_by(cache, A[:12], record) == blocks[:num_found]
        own = list(range(50, 50 + num_known))
        assert record.array().ravel().tolist() == own + list(range(num_known, 4 * num_found))


def test_experts_go_with_their_unit_and_the_first_that_are_known_stay():
    pool, cache = make_cache(num_blocks=2)
    blocks = pool.allocate(2)
    cache.insert(keys_of(A[:8]), blocks, record_of(5))  # what ran for others is not known whole
    cache.insert(keys_of(A[:8]), blocks, record_of(8, first=50))
    record = ExpertRecord()
    assert found_by(cache, A[:8], record) == blocks
    assert record.array().ravel().tolist() == [0, 1, 2, 3, 54, 55, 56, 57]
    for _ in range(2):
        release(pool, cache, blocks)
    cache.evict(2)
    assert found_by(cache, A[:8], ExpertRecord()) == [] and len(cache) == 0
