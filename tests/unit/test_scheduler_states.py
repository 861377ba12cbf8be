"""The scheduler over homes with places for states: who holds one, from when on, and who gives way for it."""

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken, ScoredRequest
from cpinfer.engine.scheduler import Scheduler
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.state_pool import StatePool, StateSlot
from cpinfer.layout.shards import KVSharding

SHARDING = KVSharding(num_shards=1, interleave=4, block_size=4)


def make_scheduler(num_ranks, num_slots, *, num_blocks=100, budget=1000, num_homes=1):
    homes = [
        KVHome(num_blocks, SHARDING, enable_prefix_caching=False, states=StatePool(num_ranks, num_slots))
        for _ in range(num_homes)
    ]
    return Scheduler(homes, SHARDING, 100, budget)


def make_request(index, length=5, max_new_tokens=3, **words):
    prompt = Prompt(index, f"p{index}", tuple(range(1000 * index, 1000 * index + length)))
    return SampledRequest(prompt, 0, SamplingParams(), max_new_tokens, **words)


def advance(scheduler):
    step = scheduler.schedule()
    sampled = [SampledToken(5, -1.0, -0.5) for _ in step.samples]
    finished = scheduler.commit(step, sampled, lambda request: False)
    scheduler.check_integrity()
    return finished


def test_samples_of_a_prompt_have_a_state_each_on_the_ranks_in_turn_and_give_them_back():
    scheduler = make_scheduler(2, 2)
    prompt = make_request(0).prompt
    group = [SampledRequest(prompt, i, SamplingParams(), 3) for i in range(3)]
    for request in group:
        scheduler.add(request)
    step = scheduler.schedule()
    assert step.chunks[0].prefill.requests == tuple(group)
    assert [r.state for r in group] == [StateSlot(0, 0), StateSlot(1, 0), StateSlot(0, 1)]
    scheduler.commit(step, [SampledToken(5, -1.0, -0.5)] * 3, lambda request: False)
    while scheduler.num_unfinished:
        advance(scheduler)
    assert all(r.state is None for r in group)
    assert scheduler.homes[0].states.num_free == 4


def test_who_finds_no_place_for_a_state_waits_for_one():
    scheduler = make_scheduler(1, 2)
    requests = [make_request(i) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert len(scheduler.schedule().chunks) == 2
    assert requests[2].state is None


def test_of_a_group_as_many_are_admitted_as_there_are_places():
    scheduler = make_scheduler(1, 2)
    prompt = make_request(0).prompt
    group = [SampledRequest(prompt, i, SamplingParams(), 3) for i in range(3)]
    for request in group:
        scheduler.add(request)
    assert scheduler.schedule().chunks[0].prefill.requests == tuple(group[:2])
    assert scheduler.num_unfinished == 3


def test_a_turn_goes_on_from_the_place_of_the_turn_before():
    scheduler = make_scheduler(2, 2)
    other, first = make_request(1, max_new_tokens=20), make_request(2, keeps_kv=True)
    scheduler.add(other)
    scheduler.add(first)
    while first.finish_reason is None:
        advance(scheduler)
    place = first.state
    assert place == StateSlot(1, 0)
    turn = make_request(3, continues=first)
    turn.prompt = Prompt(3, "turn", (*first.all_token_ids, 7, 8))
    scheduler.add(turn)
    [chunk] = scheduler.schedule().chunks
    assert chunk.start == first.next_position
    assert (turn.state, first.state) == (place, None)


def test_kept_states_give_way_to_requests_that_need_a_place_the_longest_unused_first():
    scheduler = make_scheduler(1, 2)
    kept = [make_request(i, keeps_kv=True) for i in range(2)]
    for request in kept:
        scheduler.add(request)
        while request.finish_reason is None:
            advance(scheduler)
    scheduler.add(make_request(5))
    advance(scheduler)
    assert [r.state for r in kept] == [None, StateSlot(0, 1)]
    assert kept[0].blocks == []


def test_a_preempted_request_gives_its_place_back_and_begins_anew():
    scheduler = make_scheduler(1, 4, num_blocks=4)
    requests = [make_request(i, length=4, max_new_tokens=9) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    while not scheduler.stats.num_preemptions:
        advance(scheduler)
    assert requests[1].state is None
    assert requests[1].sampled
    while scheduler.num_unfinished:
        advance(scheduler)
    assert scheduler.homes[0].states.num_free == 4


def test_who_is_aborted_or_scored_leaves_no_state_behind():
    scheduler = make_scheduler(1, 3, budget=4)
    prompt = make_request(0, length=9).prompt
    group = [SampledRequest(prompt, i, SamplingParams(), 3) for i in range(2)]
    scored = ScoredRequest(Prompt(1, "scored", (1, 2, 3)), (4, 5))
    for request in (*group, scored):
        scheduler.add(request)
    advance(scheduler)
    leader, heir = group
    heirs = heir.state
    scheduler.abort([leader])
    scheduler.check_integrity()
    assert (leader.state, heir.state) == (None, heirs)
    scheduler.abort([heir])
    while scheduler.num_unfinished:
        advance(scheduler)
    assert scheduler.homes[0].states.num_free == 3


@pytest.mark.parametrize("version", [None, 4])
def test_what_is_computed_anew_has_no_place_until_it_is_admitted_again(version):
    scheduler = make_scheduler(1, 3, budget=6)
    running, prefilling = make_request(0, max_new_tokens=30), make_request(1, length=9)
    kept = make_request(2, keeps_kv=True)
    for request in (kept, running, prefilling):
        scheduler.add(request)
        advance(scheduler)
    while kept.finish_reason is None:
        advance(scheduler)
    anew = scheduler.restarted(version)
    assert [r.state for r in (running, prefilling, kept)] == [None] * 3
    assert running.earlier_weights == ([] if version is None else [(4, len(running.sampled))])
    while anew.num_unfinished:
        advance(anew)
    assert anew.homes[0].states.num_free == 3
