"""States behind prefixes: which are found, which give way, and what a scheduler makes of them."""

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.scheduler import Scheduler
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.state_cache import StateCache
from cpinfer.kv_cache.state_pool import StatePool
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.states import StatePlace

A, B, C = b"a", b"b", b"c"
SHARDING = KVSharding(num_shards=1, interleave=4, block_size=4)


def kept(cache, *keys):
    for key in keys:
        cache.insert(key, cache.take())


def test_places_are_taken_on_the_ranks_in_turn_behind_the_first():
    cache = StateCache(2, 2, first_slot=5)
    assert [cache.take() for _ in range(5)] == [*(StatePlace(r, s) for s in (5, 6) for r in (0, 1)), None]


def test_of_a_prefix_the_longest_is_found_that_has_a_state_at_its_very_end():
    cache = StateCache(1, 3)
    kept(cache, B)
    assert cache.num_known([A, B, C]) == 2 and cache.num_known([A, C]) == 0
    kept(cache, A)
    assert cache.num_known([A, C]) == 1 and cache.num_known([A, B, C]) == 2 and cache.num_known([]) == 0


def test_the_one_unused_for_longest_gives_way_but_none_that_is_in_use():
    cache = StateCache(1, 2)
    kept(cache, A, B)
    place_of_a = cache.use(A)
    assert cache.take({place_of_a}) == StatePlace(0, 1)
    assert A in cache and B not in cache and cache.num_evicted == 1
    assert cache.take({place_of_a}) is None


def test_a_second_state_behind_the_same_prefix_gives_its_place_back():
    cache = StateCache(1, 2)
    kept(cache, A, A)
    assert len(cache) == 1 and cache.take() is not None
    cache.check_integrity({})


def test_what_is_coming_is_known_until_it_has_come():
    cache = StateCache(1, 2)
    cache.announce([A, C])
    cache.announce([A])
    cache.withdraw([A, C])
    assert cache.num_coming([A, B]) == 1 and cache.num_coming([B, C]) == 0
    with pytest.raises(ValueError, match="1 states are waited for in vain"):
        cache.check_integrity({})


def test_a_lost_place_is_named():
    cache = StateCache(1, 2)
    cache._free.pop()
    with pytest.raises(ValueError, match=r"StatePlace\(pcp_rank=0, slot=0\).* lost, or held twice"):
        cache.check_integrity({})


# --- the scheduler ---


def make_scheduler(num_cached=2, **words):
    home = KVHome(100, SHARDING, enable_prefix_caching=True, states=StatePool(1, 8))
    return Scheduler([home], SHARDING, 100, words.pop("budget", 1000), states=StateCache(1, num_cached, 8), **words)


def request(tokens, index=0):
    return SampledRequest(Prompt(index, f"p{index}", tuple(tokens)), 0, SamplingParams(), 1)


def steps_of(scheduler, *requests):
    """(start, end, whether the state behind it was kept) of every chunk, step by step."""
    for r in requests:
        scheduler.add(r)
    steps = []
    while scheduler.num_unfinished:
        step = scheduler.schedule()
        steps.append([(c.start, c.end, c.state_place is not None) for c in step.chunks])
        scheduler.commit(step, [SampledToken(5, -1.0, -0.5)] * len(step.samples), lambda r: False)
        scheduler.check_integrity()
    return steps


def test_a_prompt_leaves_the_state_behind_its_last_whole_unit_from_which_the_same_prompt_goes_on():
    scheduler, prompt = make_scheduler(), range(14)
    assert steps_of(scheduler, request(prompt)) == [[(0, 12, True)], [(12, 14, False)]]
    assert steps_of(scheduler, request(prompt)) == [[(12, 14, False)]]
    assert scheduler.stats.num_cached_prefill_tokens == 12


def test_a_state_behind_other_tokens_or_more_of_them_is_not_found():
    scheduler = make_scheduler()
    steps_of(scheduler, request(range(14)))
    assert steps_of(scheduler, request([9, *range(1, 14)]))[0][0][:2] == (0, 12)
    assert steps_of(scheduler, request(range(11)))[0][0][:2] == (0, 8)


def test_where_prompts_part_the_second_leaves_a_state_for_the_third():
    scheduler = make_scheduler(num_cached=4)
    document = list(range(8))
    chunks = [steps_of(scheduler, request([*document, *range(50 * i, 50 * i + 6)], i)) for i in range(1, 4)]
    assert chunks[0] == [[(0, 12, True)], [(12, 14, False)]]
    assert chunks[1] == [[(0, 8, True)], [(8, 12, True)], [(12, 14, False)]]
    assert chunks[2] == [[(8, 12, True)], [(12, 14, False)]]


def test_of_prompts_that_come_together_two_compute_what_all_have_in_common():
    scheduler = make_scheduler(num_cached=8)
    document = list(range(40))
    steps_of(scheduler, *(request([*document, *range(100 * i, 100 * i + 6)], i) for i in range(1, 7)))
    assert scheduler.stats.num_cached_prefill_tokens == 4 * 40
    assert scheduler.stats.num_computed_prefill_tokens == 6 * 46 - 4 * 40


def test_with_fewer_places_than_states_the_oldest_are_computed_again():
    scheduler = make_scheduler(num_cached=1)
    first, second = range(14), range(100, 114)
    for prompt in (first, second, second, first):
        steps_of(scheduler, request(prompt))
    assert scheduler.stats.num_cached_prefill_tokens == 12
    assert scheduler.states.num_evicted == 2


def test_a_state_that_is_begun_with_in_a_step_does_not_give_way_in_it():
    scheduler = make_scheduler(num_cached=1)
    steps_of(scheduler, request(range(14)))
    same, other = request(range(14), 1), request(range(100, 114), 2)
    assert steps_of(scheduler, same, other) == [[(12, 14, False), (0, 12, False)], [(12, 14, False)]]


def test_other_weights_find_no_state():
    scheduler = make_scheduler()
    steps_of(scheduler, request(range(14)))
    scheduler = scheduler.restarted(1)
    assert len(scheduler.states) == 0
    assert steps_of(scheduler, request(range(14)))[0] == [(0, 12, True)]


def test_a_prefill_that_is_aborted_leaves_nobody_waiting():
    scheduler = make_scheduler(budget=4)
    leaving, same = request(range(14)), request(range(14), 1)
    scheduler.add(leaving)
    scheduler.add(same)
    scheduler.commit(scheduler.schedule(), [], lambda r: False)
    scheduler.abort([leaving])
    scheduler.check_integrity()
    assert steps_of(scheduler)[0][0][0] in (0, 4)
