"""The scheduler: who runs next under pools of blocks and a budget of tokens. No tensor, no model."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken, ScoredRequest, TokenScore
from cpinfer.engine.scheduler import Scheduler
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.shards import KVSharding
from line_count import lines_run

SHARDING = KVSharding(num_shards=1, interleave=4, block_size=4)


def never(sequence):
    return False


def make_sequence(index, prompt_len, max_new_tokens=4, sample_index=0, first_token=0):
    """Prompts begin with a token of their own, so that none is a prefix of another unless it should be."""
    prompt = Prompt(index, f"p{index}", (first_token or 1000 + index, *range(2, prompt_len + 1)))
    return SampledRequest(prompt, sample_index, SamplingParams(), max_new_tokens)


def make_group(index, n, prompt_len, max_new_tokens=4):
    prompt = make_sequence(index, prompt_len).prompt
    return [SampledRequest(prompt, i, SamplingParams(), max_new_tokens) for i in range(n)]


def make_scheduler(
    num_blocks=100, max_num_seqs=100, max_num_batched_tokens=1000, sharding=SHARDING, num_homes=1, prefixes=False
):
    """(pool of the first home, scheduler)"""
    homes = [KVHome(num_blocks, sharding, enable_prefix_caching=prefixes) for _ in range(num_homes)]
    return homes[0].pool, Scheduler(homes, sharding, max_num_seqs, max_num_batched_tokens)


def submit(scheduler, *sequences):
    for sequence in sequences:
        scheduler.add(sequence)


def tokens(step, token_id=5):
    return [SampledToken(token_id, -1.0, -0.5) for _ in step.samples]


def indices(step):
    return [s.prompt.index for s in step.samples]


def spans(step):
    """(prompt, start, end) of the step's chunks."""
    return [(chunk.prefill.samples[0].prompt.index, chunk.start, chunk.end) for chunk in step.chunks]


def advance(scheduler, stops=never, token_id=5):
    """One step; the finished sequences."""
    step = scheduler.schedule()
    return scheduler.commit(step, tokens(step, token_id), stops)


def run(scheduler, stops=never, watch=lambda step: None):
    """All steps to the end; the finished sequences in the order in which they finished."""
    finished = []
    while (step := scheduler.schedule()) is not None:
        watch(step)
        finished += scheduler.commit(step, tokens(step), stops)
        scheduler.check_integrity()
    return finished


def test_nothing_to_do_is_no_step():
    assert make_scheduler()[1].schedule() is None


def test_a_sequence_is_prefilled_once_and_then_decoded_to_its_end():
    pool, scheduler = make_scheduler()
    sequence = make_sequence(0, prompt_len=6, max_new_tokens=3)
    scheduler.add(sequence)
    kinds = []
    finished = run(scheduler, watch=lambda step: kinds.append(bool(step.chunks)))
    assert kinds == [True, False, False]
    assert finished == [sequence] and sequence.finish_reason == "length" and len(sequence.sampled) == 3
    assert pool.num_free == 100 and sequence.blocks == []


def test_one_new_token_needs_no_decode_step():
    _, scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 6, max_new_tokens=1))
    kinds = []
    run(scheduler, watch=lambda step: kinds.append(bool(step.chunks)))
    assert kinds == [True]


def test_a_step_is_either_chunks_or_one_token_of_every_running_sequence():
    _, scheduler = make_scheduler()
    submit(scheduler, make_sequence(0, 6), make_sequence(1, 3))
    step = scheduler.schedule()
    assert spans(step) == [(0, 0, 6), (1, 0, 3)] and step.running == () and indices(step) == [0, 1]
    scheduler.commit(step, tokens(step), never)
    scheduler.add(make_sequence(2, 2))
    step = scheduler.schedule()
    assert spans(step) == [(2, 0, 2)] and step.running == ()
    scheduler.commit(step, tokens(step), never)
    step = scheduler.schedule()
    assert step.chunks == () and step.samples == step.running and indices(step) == [0, 1, 2]


def test_a_sequence_takes_the_blocks_of_its_prompt_and_then_one_at_a_time():
    pool, scheduler = make_scheduler(num_blocks=10)
    sequence = make_sequence(0, prompt_len=5, max_new_tokens=9)
    scheduler.add(sequence)
    held = []
    # Seen between schedule and commit: the step's newest token has its slot, the one it samples has not.
    run(scheduler, watch=lambda step: held.append((sequence.next_position + 1, len(sequence.blocks))))
    assert held == [(5, 2), (6, 2), (7, 2), (8, 2), (9, 3), (10, 3), (11, 3), (12, 3), (13, 4)]
    assert pool.num_free == 10


def test_a_sequence_grows_behind_itself_when_it_was_placed_with_room():
    _, scheduler = make_scheduler(num_blocks=10)
    sequences = [make_sequence(0, 4, max_new_tokens=9), make_sequence(1, 4, max_new_tokens=9)]
    submit(scheduler, *sequences)
    last = []
    run(scheduler, watch=lambda step: last.append([list(s.blocks) for s in sequences]))
    assert last[-1] == [[0, 1, 2], [3, 4, 5]]


def test_shards_share_the_work_of_a_block_table():
    pool, scheduler = make_scheduler(num_blocks=10, sharding=KVSharding(4, 4, 4))
    scheduler.add(make_sequence(0, prompt_len=17, max_new_tokens=1))  # shard 0 holds 8 of 17 tokens
    scheduler.schedule()
    assert pool.num_free == 8


def test_admission_is_first_come_first_served_by_blocks():
    pool, scheduler = make_scheduler(num_blocks=5)
    for index, prompt_len in enumerate((12, 9, 1)):  # 3, 3 and 1 blocks
        scheduler.add(make_sequence(index, prompt_len, max_new_tokens=1))
    step = scheduler.schedule()
    assert indices(step) == [0]  # the third would fit, but the second comes before it
    assert pool.num_free == 2
    scheduler.commit(step, tokens(step), never)
    assert indices(scheduler.schedule()) == [1, 2]


def test_no_more_than_max_num_seqs_run_at_once():
    _, scheduler = make_scheduler(max_num_seqs=2)
    for index in range(5):
        scheduler.add(make_sequence(index, 2, max_new_tokens=3))
    sizes = []
    run(scheduler, watch=lambda step: sizes.append(len(step.samples)))
    assert max(sizes) == 2 and sum(sizes) == 15


def test_a_token_budget_below_max_num_seqs_bounds_the_decode_steps_too():
    _, scheduler = make_scheduler(max_num_seqs=100, max_num_batched_tokens=3)
    for index in range(7):
        scheduler.add(make_sequence(index, 1, max_new_tokens=4))
    sizes = []
    run(scheduler, watch=lambda step: sizes.append(len(step.samples)))
    assert max(sizes) == 3 and sum(sizes) == 28


def test_a_freed_place_is_filled_before_the_batch_advances():
    _, scheduler = make_scheduler(max_num_seqs=2)
    for index, new in enumerate((1, 4, 4)):
        scheduler.add(make_sequence(index, 2, max_new_tokens=new))
    steps = []
    run(scheduler, watch=lambda step: steps.append((bool(step.chunks), indices(step))))
    assert steps[:3] == [(True, [0, 1]), (True, [2]), (False, [1, 2])]


def test_stop_wins_over_length_on_the_last_token():
    for max_new_tokens, stops, reason in ((1, lambda s: True, "stop"), (1, never, "length")):
        _, scheduler = make_scheduler()
        sequence = make_sequence(0, 2, max_new_tokens)
        scheduler.add(sequence)
        run(scheduler, stops)
        assert sequence.finish_reason == reason


def test_stops_are_asked_with_the_newest_token_in_place():
    _, scheduler = make_scheduler()
    sequence = make_sequence(0, 2, max_new_tokens=10)
    scheduler.add(sequence)
    finished = run(scheduler, stops=lambda s: len(s.token_ids) == 3)
    assert finished == [sequence] and len(sequence.token_ids) == 3 and sequence.finish_reason == "stop"


def test_blocks_of_a_finished_sequence_are_free_at_once():
    pool, scheduler = make_scheduler(num_blocks=2)
    submit(scheduler, make_sequence(0, 8, max_new_tokens=1), make_sequence(1, 8, max_new_tokens=1))
    step = scheduler.schedule()
    assert indices(step) == [0] and pool.num_free == 0
    scheduler.commit(step, tokens(step), never)
    assert pool.num_free == 2


def test_abort_frees_what_runs_is_prefilled_or_waits():
    pool, scheduler = make_scheduler(num_blocks=20, max_num_batched_tokens=12)
    requests = [*make_group(0, 2, 6), make_sequence(1, 20), make_sequence(2, 8)]
    submit(scheduler, *requests)
    advance(scheduler)
    scheduler.take_blocks_to_copy(0)
    assert scheduler.num_unfinished == 4 and pool.num_free < 20
    assert spans(scheduler.schedule())[0] == (1, 4, 16)
    scheduler.abort(requests)
    scheduler.check_integrity()
    assert (pool.num_free, scheduler.num_unfinished) == (20, 0)
    assert scheduler.schedule() is None
    scheduler.abort([])  # is harmless
    assert pool.num_free == 20


@pytest.mark.parametrize("who", [0, 1, 2])
def test_abort_of_a_sample_that_is_prefilled_leaves_the_others_their_blocks(who):
    """Also of the one that held them for all."""
    pool, scheduler = make_scheduler(num_blocks=20, max_num_batched_tokens=4)
    group = make_group(0, 3, 10, max_new_tokens=2)
    submit(scheduler, *group)
    advance(scheduler)
    scheduler.abort([group[who]])
    scheduler.check_integrity()
    staying = [r for r in group if r is not group[who]]
    assert run(scheduler) == staying and not group[who].sampled and pool.num_free == 20


def test_abort_of_one_that_runs_remembers_what_it_computed():
    pool, scheduler = make_scheduler(num_blocks=20, prefixes=True)
    request = make_sequence(0, 8, max_new_tokens=9)
    scheduler.add(request)
    for _ in range(4):
        advance(scheduler)
    scheduler.abort([request])
    scheduler.check_integrity()
    assert request.finish_reason is None and len(request.sampled) == 4 and request.blocks == []
    assert pool.num_free < 20


def test_a_wrong_number_of_tokens_is_an_error():
    _, scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 2))
    step = scheduler.schedule()
    with pytest.raises(ValueError):
        scheduler.commit(step, [], never)


@pytest.mark.parametrize("prompt_len, new, fits", [(17, 4, True), (17, 5, False), (100, 1, False)])
def test_a_sequence_that_never_fits_the_pool_is_refused_with_numbers(prompt_len, new, fits):
    pool, scheduler = make_scheduler(num_blocks=5)  # 20 tokens; the last new token is never cached
    if fits:
        scheduler.add(make_sequence(3, prompt_len, new))
        assert len(run(scheduler)) == 1
        return
    blocks = -(-(prompt_len + new - 1) // 4)
    with pytest.raises(ValueError, match=rf"'p3': {prompt_len} tokens and {new} new ones need {blocks} .* pool has 5"):
        scheduler.add(make_sequence(3, prompt_len, new))
    assert scheduler.num_unfinished == 0 and pool.num_free == 5


def test_a_sequence_that_fits_the_pool_may_wait_while_others_hold_it():
    _, scheduler = make_scheduler(num_blocks=5)
    scheduler.add(make_sequence(0, 17))
    scheduler.schedule()
    scheduler.add(make_sequence(1, 17))
    assert scheduler.num_unfinished == 2


def test_integrity_check_finds_a_block_that_nobody_holds():
    _, scheduler = make_scheduler()
    sequence = make_sequence(0, 8)
    scheduler.add(sequence)
    advance(scheduler)
    scheduler.check_integrity()
    sequence.blocks.pop()
    with pytest.raises(ValueError, match=r"blocks \[1\]"):
        scheduler.check_integrity()


# Chunks


def test_a_prompt_above_the_budget_is_computed_in_chunks_and_samples_once_at_its_end():
    pool, scheduler = make_scheduler(max_num_batched_tokens=8)
    sequence = make_sequence(0, 21, max_new_tokens=1)
    scheduler.add(sequence)
    steps = []
    run(scheduler, watch=lambda step: steps.append((spans(step), len(step.samples), 100 - pool.num_free)))
    assert steps == [([(0, 0, 8)], 0, 6), ([(0, 8, 16)], 0, 6), ([(0, 16, 21)], 1, 6)]
    assert len(sequence.sampled) == 1


def test_a_step_computes_no_more_tokens_than_its_budget_and_fills_it_with_the_next_prompt():
    _, scheduler = make_scheduler(max_num_batched_tokens=10)
    for index, prompt_len in enumerate((4, 6, 1, 10, 12)):
        scheduler.add(make_sequence(index, prompt_len, max_new_tokens=1))
    steps = []
    run(scheduler, watch=lambda step: steps.append(spans(step)))
    assert steps == [[(0, 0, 4), (1, 0, 6)], [(2, 0, 1), (3, 0, 8), (4, 0, 1)], [(3, 8, 10), (4, 1, 8)], [(4, 8, 12)]]


@pytest.mark.parametrize(
    "sharding, budget, ends",
    [
        (KVSharding(1, 4, 4), 10, [8, 16, 24, 30]),
        (KVSharding(2, 4, 4), 10, [8, 16, 24, 30]),
        (KVSharding(2, 6, 4), 30, [24, 48, 72, 80]),
        (KVSharding(2, 6, 4), 10, [10, 20, 24, 34, 44, 48, 58, 60]),  # the unit is 24 and does not fit the budget
        (KVSharding(1, 1, 4), 3, [3, 4, 7, 8, 11]),
        (KVSharding(1, 1, 4), 1, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_chunks_end_on_multiples_of_the_prefix_unit_where_they_can(sharding, budget, ends):
    _, scheduler = make_scheduler(max_num_batched_tokens=budget, sharding=sharding)
    scheduler.add(make_sequence(0, ends[-1], max_new_tokens=1))
    steps = []
    run(scheduler, watch=lambda step: steps.extend(spans(step)))
    assert steps == [(0, start, end) for start, end in pairwise([0, *ends])]


def test_running_sequences_wait_for_the_chunks_of_a_long_prompt():
    _, scheduler = make_scheduler(max_num_batched_tokens=4)
    submit(scheduler, make_sequence(0, 4), make_sequence(1, 8))
    steps = []
    run(scheduler, watch=lambda step: steps.append((spans(step), indices(step))))
    assert steps[:4] == [([(0, 0, 4)], [0]), ([(1, 0, 4)], []), ([(1, 4, 8)], [1]), ([], [0, 1])]


# Groups: samples of one prompt


def test_a_group_prefills_its_prompt_once_and_shares_the_blocks_that_stay_as_they_are():
    pool, scheduler = make_scheduler(num_blocks=20)
    group = make_group(0, n=3, prompt_len=10)
    submit(scheduler, *group)
    step = scheduler.schedule()
    assert spans(step) == [(0, 0, 10)] and step.samples == tuple(group)
    scheduler.commit(step, tokens(step), never)
    assert scheduler.stats.num_computed_prefill_tokens == 10
    first = group[0].blocks
    assert [s.blocks[:2] for s in group] == [first[:2]] * 3
    assert [pool.refs(block) for block in first] == [3, 3, 1]
    mutable = [s.blocks[2] for s in group]
    assert len(set(mutable)) == 3 and 20 - pool.num_free == 5
    assert scheduler.take_blocks_to_copy(0) == [(mutable[0], mutable[1]), (mutable[0], mutable[2])]
    assert scheduler.take_blocks_to_copy(0) == []


def test_a_prompt_that_ends_with_a_block_leaves_nothing_to_copy():
    pool, scheduler = make_scheduler(num_blocks=20)
    group = make_group(0, n=3, prompt_len=8)
    submit(scheduler, *group)
    advance(scheduler)
    assert 20 - pool.num_free == 2 and scheduler.take_blocks_to_copy(0) == []
    advance(scheduler)  # now each writes, in a block of its own
    assert 20 - pool.num_free == 5
    assert [pool.refs(s.blocks[-1]) for s in group] == [1, 1, 1]


def test_a_block_that_one_shard_has_filled_and_another_has_not_is_copied():
    """7 tokens over two shards: shard 0 has 4 of them in block 0, shard 1 has room for another there."""
    _, scheduler = make_scheduler(sharding=KVSharding(2, 4, 4))
    group = make_group(0, n=2, prompt_len=7)
    submit(scheduler, *group)
    advance(scheduler)
    assert scheduler.take_blocks_to_copy(0) == [(0, group[1].blocks[0])] and group[0].blocks == [0]


def test_prompts_of_equal_tokens_are_computed_once_whoever_asked_for_them():
    _, scheduler = make_scheduler()
    submit(scheduler, make_sequence(0, 6, first_token=9), make_sequence(1, 6, first_token=9), make_sequence(2, 6))
    step = scheduler.schedule()
    assert spans(step) == [(0, 0, 6), (2, 0, 6)] and [s.prompt.index for s in step.samples] == [0, 1, 2]


def test_a_group_is_as_large_as_there_are_places_and_the_rest_follows_as_a_group():
    _, scheduler = make_scheduler(max_num_seqs=4)
    submit(scheduler, *make_group(0, n=6, prompt_len=6, max_new_tokens=2))
    steps = []
    run(scheduler, watch=lambda step: steps.append((spans(step), len(step.samples))))
    assert steps == [([(0, 0, 6)], 4), ([], 4), ([(0, 0, 6)], 2), ([], 2)]


def test_a_group_is_as_large_as_its_blocks_allow():
    """6 tokens: one block that all share, and one of its own for each."""
    _, scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=6)
    submit(scheduler, *make_group(0, n=5, prompt_len=6, max_new_tokens=2))
    steps = []
    run(scheduler, watch=lambda step: steps.append((spans(step), len(step.samples))))
    assert steps == [([(0, 0, 6)], 3), ([], 3), ([(0, 0, 6)], 2), ([], 2)]


def test_a_group_ends_sample_by_sample_and_shared_blocks_go_with_the_last():
    pool, scheduler = make_scheduler(num_blocks=20)
    group = make_group(0, n=3, prompt_len=9, max_new_tokens=3)
    submit(scheduler, *group)
    advance(scheduler, stops=lambda s: s is group[0])  # the leader goes first
    assert [pool.refs(block) for block in group[1].blocks] == [2, 2, 1]
    advance(scheduler, stops=lambda s: s is group[2])
    assert [pool.refs(block) for block in group[1].blocks] == [1, 1, 1]
    assert advance(scheduler) == [group[1]]
    assert pool.num_free == 20
    scheduler.check_integrity()


def prefill_of_two_groups_and_one_copy():
    """(scheduler, its first step, the groups): two groups of two, and blocks for the copy of the first alone."""
    pool, scheduler = make_scheduler(num_blocks=6)
    groups = make_group(0, 2, prompt_len=6, max_new_tokens=2), make_group(1, 2, prompt_len=6, max_new_tokens=2)
    submit(scheduler, *groups[0], *groups[1])
    step = scheduler.schedule()
    assert step.samples == (*groups[0], *groups[1])
    pool.allocate(1)  # somebody else's
    return scheduler, step, groups


def test_a_sample_without_blocks_for_its_copy_is_put_back_and_gets_its_token_again():
    scheduler, step, (first, second) = prefill_of_two_groups_and_one_copy()
    scheduler.commit(step, tokens(step, token_id=7), never)
    assert [s.token_ids for s in (*first, *second)] == [[7], [7], [7], []]
    assert scheduler.num_unfinished == 4 and second[1].blocks == []
    advance(scheduler)  # the three others end
    step = scheduler.schedule()
    assert spans(step) == [(1, 0, 6)] and step.samples == (second[1],)
    scheduler.commit(step, tokens(step, token_id=7), never)
    assert second[1].token_ids == [7] and scheduler.num_unfinished == 1


def test_samples_that_were_put_back_keep_their_order_and_come_before_those_that_wait():
    scheduler, step, (first, second) = prefill_of_two_groups_and_one_copy()
    late = make_sequence(2, 3, max_new_tokens=1)
    scheduler.add(late)
    scheduler.commit(step, tokens(step), never)
    admitted = []
    while (step := scheduler.schedule()) is not None:
        admitted += [chunk.prefill.samples[0] for chunk in step.chunks]
        scheduler.commit(step, tokens(step), never)
    assert admitted == [second[1], late]
    assert all(len(s.sampled) == s.max_new_tokens for s in (*first, *second, late))


# Homes


def test_samples_are_dealt_to_the_home_with_the_fewest_and_prefilled_once_for_all():
    _, scheduler = make_scheduler(num_homes=2, num_blocks=20)
    lone, group = make_sequence(0, 4), make_group(1, n=4, prompt_len=6)
    submit(scheduler, lone, *group)
    step = scheduler.schedule()
    assert spans(step) == [(0, 0, 4), (1, 0, 6)]
    assert [s.home for s in (lone, *group)] == [0, 1, 0, 1, 0]
    assert step.chunks[1].prefill.leaders == {1: group[0], 0: group[1]}
    assert [bool(s.blocks) for s in group] == [True, True, False, False]
    scheduler.commit(step, tokens(step), never)
    assert scheduler.stats.num_computed_prefill_tokens == 10
    for follower, leader in ((group[2], group[0]), (group[3], group[1])):
        assert follower.blocks[0] == leader.blocks[0] and follower.blocks[1] != leader.blocks[1]
    blocks_to_copy = {h: [(group[h ^ 1].blocks[1], group[3 - h].blocks[1])] for h in (0, 1)}
    assert scheduler.blocks_to_copy == blocks_to_copy
    assert scheduler.take_blocks_to_copy(1) == blocks_to_copy[1]
    assert scheduler.take_blocks_to_copy(0) == []  # a rank is in one home; the others' copies are not its business
    scheduler.check_integrity()


def test_a_home_of_its_own_pool_is_full_alone():
    """Two homes of 3 blocks: the second sequence does not wait for the blocks of the first."""
    _, scheduler = make_scheduler(num_homes=2, num_blocks=3)
    submit(scheduler, *(make_sequence(i, 9, max_new_tokens=2) for i in range(3)))
    step = scheduler.schedule()
    assert indices(step) == [0, 1] and [home.pool.num_free for home in scheduler.homes] == [0, 0]


def test_a_home_starts_where_the_poorest_home_of_its_group_does():
    """What only one home remembers is computed again, and written to both."""
    _, scheduler = make_scheduler(num_homes=2, num_blocks=20, prefixes=True)
    scheduler.add(make_sequence(0, 9, max_new_tokens=1, first_token=7))
    run(scheduler)
    assert [len(home.prefixes) for home in scheduler.homes] == [2, 0]
    prompt = make_sequence(1, 9, first_token=7).prompt
    group = [SampledRequest(prompt, i, SamplingParams(), 1) for i in range(2)]
    submit(scheduler, *group)
    step = scheduler.schedule()
    assert spans(step) == [(1, 0, 9)]
    scheduler.commit(step, tokens(step), never)
    assert [len(home.prefixes) for home in scheduler.homes] == [2, 2]
    submit(scheduler, *(SampledRequest(prompt, i, SamplingParams(), 1) for i in (2, 3)))
    assert spans(scheduler.schedule()) == [(1, 8, 9)]
    scheduler.check_integrity()


# Remembered prefixes


def test_a_remembered_prefix_is_shared_and_not_computed_again():
    pool, scheduler = make_scheduler(num_blocks=20, prefixes=True)
    first, second = (make_sequence(i, 10, max_new_tokens=2, first_token=7) for i in range(2))
    scheduler.add(first)
    advance(scheduler)
    scheduler.add(second)
    step = scheduler.schedule()
    assert spans(step) == [(1, 8, 10)] and second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    assert [pool.refs(block) for block in second.blocks] == [3, 3, 1]  # both sequences and the cache
    scheduler.commit(step, tokens(step), never)
    stats = scheduler.stats
    assert (stats.num_computed_prefill_tokens, stats.num_cached_prefill_tokens, stats.num_preemptions) == (12, 8, 0)


def test_at_least_one_token_is_computed_for_its_logits():
    _, scheduler = make_scheduler(prefixes=True)
    submit(scheduler, make_sequence(0, 8, max_new_tokens=1, first_token=7))
    run(scheduler)
    scheduler.add(make_sequence(1, 8, max_new_tokens=1, first_token=7))
    step = scheduler.schedule()
    assert spans(step) == [(1, 4, 8)]


def test_an_answer_is_remembered_like_a_prompt():
    """Multi-turn: the next prompt is the last one and its answer. The newest token has no KV."""
    _, scheduler = make_scheduler(prefixes=True)
    sequence = make_sequence(0, 6, max_new_tokens=7)
    scheduler.add(sequence)
    run(scheduler)
    assert sequence.next_position == 12
    prompt = Prompt(1, "p1", (*sequence.all_token_ids, 50, 51))
    scheduler.add(SampledRequest(prompt, 0, SamplingParams(), 1))
    assert spans(scheduler.schedule()) == [(1, 12, 15)]


def test_remembered_prefixes_give_way_to_sequences():
    pool, scheduler = make_scheduler(num_blocks=4, prefixes=True)
    submit(scheduler, make_sequence(0, 8, max_new_tokens=1))
    run(scheduler)
    assert pool.num_free == 2
    submit(scheduler, make_sequence(1, 16, max_new_tokens=1))
    assert spans(scheduler.schedule()) == [(1, 0, 16)]
    assert pool.num_free == 0 and len(scheduler.homes[0].prefixes) == 0


def test_a_prompt_that_fits_finds_its_blocks_when_what_it_matches_is_shared_with_another_prefix():
    """Units of 3 blocks: two samples end their prompt's unit differently, so two units hold its first two blocks."""
    pool, scheduler = make_scheduler(num_blocks=4, sharding=KVSharding(1, 6, 2), prefixes=True)
    group = make_group(0, n=2, prompt_len=4, max_new_tokens=3)
    submit(scheduler, *group)
    while (step := scheduler.schedule()) is not None:
        sampled = [SampledToken(50 + s.sample_index, -1.0, -0.5) for s in step.samples]
        scheduler.commit(step, sampled, never)
    assert pool.num_free == 0 and len(scheduler.homes[0].prefixes) == 2
    prompt = Prompt(1, "p1", (*group[0].all_token_ids[:6], 99))
    scheduler.add(SampledRequest(prompt, 0, SamplingParams(), 2))
    assert spans(scheduler.schedule()) == [(1, 6, 7)]
    assert pool.num_free == 0 and len(scheduler.homes[0].prefixes) == 1
    scheduler.check_integrity()


# Preemption


def test_the_youngest_is_put_back_when_blocks_run_out_and_resumes_with_its_tokens():
    pool, scheduler = make_scheduler(num_blocks=5)
    old, young = make_sequence(0, 7, max_new_tokens=6), make_sequence(1, 7, max_new_tokens=3)
    submit(scheduler, old, young)
    advance(scheduler, token_id=11)
    advance(scheduler, token_id=12)  # both have 8 tokens with KV, 4 blocks are in use
    step = scheduler.schedule()  # one block is left for two that need one each
    assert step.running == (old,) and scheduler.stats.num_preemptions == 1
    assert young.blocks == [] and young.token_ids == [11, 12] and scheduler.num_unfinished == 2
    scheduler.commit(step, tokens(step, 13), never)
    seen = []
    finished = run(scheduler, watch=lambda step: seen.extend(spans(step)))
    assert finished == [old, young]
    assert seen == [(1, 0, 9)]  # its prompt and both tokens again; its third ends it
    assert young.token_ids == [11, 12, 5] and young.finish_reason == "length"
    assert scheduler.stats.num_computed_prefill_tokens == 7 + 7 + 9 and pool.num_free == 5


def test_several_that_are_put_back_return_in_their_order():
    _, scheduler = make_scheduler(num_blocks=4)
    sequences = [make_sequence(i, 4, max_new_tokens=9) for i in range(4)]
    submit(scheduler, *sequences)
    advance(scheduler)
    step = scheduler.schedule()  # each needs a second block: 3 and then 2 make way
    assert step.running == (sequences[0], sequences[1]) and scheduler.stats.num_preemptions == 2
    scheduler.commit(step, tokens(step), never)
    admitted = []
    run(scheduler, watch=lambda step: admitted.extend(chunk.prefill.samples[0].prompt.index for chunk in step.chunks))
    assert admitted.index(2) < admitted.index(3)
    assert all(len(s.sampled) == 9 for s in sequences)


def test_preemption_puts_back_the_youngest_of_that_home_alone():
    _, scheduler = make_scheduler(num_blocks=4, num_homes=2)
    sequences = [make_sequence(i, 8 if i % 2 == 0 else 4, max_new_tokens=4) for i in range(4)]
    submit(scheduler, *sequences)
    advance(scheduler)
    assert [s.home for s in sequences] == [0, 1, 0, 1]
    step = scheduler.schedule()  # home 0 is full, home 1 has two blocks left for the two that are there
    assert step.running == (sequences[0], sequences[1], sequences[3])
    assert scheduler.stats.num_preemptions == 1
    scheduler.commit(step, tokens(step), never)
    assert {s.prompt.index for s in run(scheduler)} == {0, 1, 2, 3}


def test_one_that_was_put_back_is_prefilled_alone_and_finds_what_is_remembered_of_it():
    """Its group is past the prompt, and its own tokens are no longer theirs."""
    _, scheduler = make_scheduler(num_blocks=6, prefixes=True)
    group = make_group(0, n=2, prompt_len=7, max_new_tokens=16)
    submit(scheduler, *group)
    seen = []
    finished = run(scheduler, watch=lambda step: seen.extend(spans(step)))
    assert finished == group and scheduler.stats.num_preemptions >= 1
    assert seen[0] == (0, 0, 7)
    assert all(start >= 4 for _, start, _ in seen[1:])  # the shared first block is never computed again
    assert all(len(s.sampled) == 16 for s in group)


# Everything at once


REQUESTS = st.lists(
    st.tuples(st.integers(1, 14), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2)),
    max_size=8,
)
SHARDINGS = st.builds(KVSharding, st.integers(1, 3), st.sampled_from([1, 4, 6]), st.just(4))


def make_requests(requests):
    """Samples of (prompt length, longest answer, length at which it stops, samples, first token)."""
    for index, (prompt_len, new, _, n, first_token) in enumerate(requests):
        prompt = make_sequence(index, prompt_len, first_token=first_token).prompt
        yield [SampledRequest(prompt, i, SamplingParams(), new) for i in range(n)]


@given(
    requests=REQUESTS,
    sharding=SHARDINGS,
    num_blocks=st.integers(6, 14),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 30),
    num_homes=st.integers(1, 2),
    prefixes=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_ends_once_and_nothing_leaks(
    requests, sharding, num_blocks, max_num_seqs, budget, num_homes, prefixes
):
    _, scheduler = make_scheduler(num_blocks, max_num_seqs, budget, sharding, num_homes, prefixes)
    sequences = [s for group in make_requests(requests) for s in group]
    submit(scheduler, *sequences)
    stop_at = {index: at for index, (_, _, at, _, _) in enumerate(requests)}

    def watch(step):
        scheduler.check_integrity()
        assert 1 <= len(step.samples) <= max_num_seqs or (step.chunks and not step.samples)
        num_tokens = sum(chunk.end - chunk.start for chunk in step.chunks) + len(step.running)
        assert 1 <= num_tokens <= budget
        for s in step.running:
            assert sharding.num_blocks(s.next_position + 1) <= len(s.blocks)
        for index, home in enumerate(scheduler.homes):
            holders = Counter(b for s in sequences if s.home == index for b in s.blocks)
            assert all(home.pool.refs(b) >= n for b, n in holders.items())

    finished = run(scheduler, stops=lambda s: len(s.sampled) == stop_at[s.prompt.index], watch=watch)
    assert sorted(map(id, finished)) == sorted(map(id, sequences))
    for s in sequences:
        _, new, at, _, _ = requests[s.prompt.index]
        assert len(s.sampled) == min(new, at) and s.blocks == []
        assert s.finish_reason == ("stop" if at <= new else "length")
    for home in scheduler.homes:
        home.prefixes.evict(home.pool.num_blocks)
        assert home.pool.num_free == num_blocks
    assert scheduler.num_unfinished == 0


@given(
    requests=REQUESTS,
    num_blocks=st.integers(6, 14),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(3, 20),
    num_homes=st.integers(1, 2),
    prefixes=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_two_schedulers_fed_alike_decide_alike(requests, num_blocks, max_num_seqs, budget, num_homes, prefixes):
    def decisions():
        _, scheduler = make_scheduler(num_blocks, max_num_seqs, budget, num_homes=num_homes, prefixes=prefixes)
        submit(scheduler, *(s for group in make_requests(requests) for s in group))
        steps = []

        def watch(step):
            chunks = [
                (*span, {h: tuple(s.blocks) for h, s in chunk.prefill.leaders.items()})
                for span, chunk in zip(spans(step), step.chunks, strict=True)
            ]
            samples = [(s.prompt.index, s.sample_index, s.home, tuple(s.blocks)) for s in step.samples]
            steps.append((chunks, samples, {h: list(pairs) for h, pairs in scheduler.blocks_to_copy.items()}))

        run(scheduler, stops=lambda s: len(s.sampled) == requests[s.prompt.index][2], watch=watch)
        return steps, scheduler.stats

    assert decisions() == decisions()


def test_blocks_that_a_group_will_fork_into_are_not_given_to_the_next():
    """Else its samples are put back as soon as their prompt is computed, and it is computed again."""
    _, scheduler = make_scheduler(num_blocks=4, sharding=KVSharding(1, 4, 4))
    submit(scheduler, *make_group(0, n=5, prompt_len=6, max_new_tokens=2))
    step = scheduler.schedule()
    assert [len(chunk.prefill.samples) for chunk in step.chunks] == [3]
    scheduler.commit(step, tokens(step, 9), never)
    assert len(scheduler.schedule().running) == 3


@pytest.mark.parametrize("counter", ["num_active", "num_reserved_blocks"])
def test_integrity_check_finds_a_load_that_is_not_what_is_under_way(counter):
    _, scheduler = make_scheduler(num_homes=2)
    submit(scheduler, *make_group(0, n=3, prompt_len=6))
    scheduler.schedule()
    scheduler.check_integrity()
    load = scheduler._load[1]
    setattr(load, counter, getattr(load, counter) + 1)
    with pytest.raises(ValueError, match="scheduler is inconsistent"):
        scheduler.check_integrity()


def all_at_once(num_sequences, n=1, num_homes=2):
    """A scheduler in which so many samples, `n` to a prompt, may start in one step."""
    _, scheduler = make_scheduler(10 * num_sequences, num_sequences, 10 * num_sequences, num_homes=num_homes)
    for index in range(num_sequences // n):
        submit(scheduler, *make_group(index, n=n, prompt_len=6))
    return scheduler


def first_two_steps(scheduler):
    for _ in range(2):
        advance(scheduler)
    assert len(scheduler._running) == scheduler.max_num_seqs


@pytest.mark.parametrize("n", [1, 4])
def test_to_admit_a_prompt_costs_the_same_however_many_are_under_way(n):
    few, many = (lines_run(lambda s=all_at_once(size, n): first_two_steps(s)) / size for size in (64, 512))
    assert many <= 1.4 * few


def test_to_admit_a_given_answer_costs_the_same_however_many_are_under_way():
    def cost(num_sequences):
        _, scheduler = make_scheduler(10 * num_sequences, num_sequences, 10 * num_sequences)
        for index in range(num_sequences):
            prompt = make_sequence(index, 6).prompt
            submit(scheduler, ScoredRequest(prompt, (5,)))
        return lines_run(scheduler.schedule) / num_sequences

    assert cost(512) <= 1.4 * cost(64)


def test_samples_and_given_answers_run_side_by_side_and_leave_nothing_behind():
    pool, scheduler = make_scheduler(max_num_batched_tokens=5)
    prompt = make_sequence(0, 6).prompt
    samples = [SampledRequest(prompt, i, SamplingParams(), 2) for i in range(2)]
    scored = [ScoredRequest(prompt, targets) for targets in ((7, 8, 9), (7,))]
    submit(scheduler, samples[0], scored[0], samples[1], scored[1])
    finished = []
    while (step := scheduler.schedule()) is not None:
        scores = [TokenScore(-float(place), True) for chunk in step.chunks for place in chunk.scored_positions]
        finished += scheduler.commit(step, tokens(step), never, scores)
        scheduler.check_integrity()
    assert sorted(map(id, finished)) == sorted(map(id, (*samples, *scored)))
    assert [[score.logprob for score in request.scores] for request in scored] == [[-5.0, -6.0, -7.0], [-5.0]]
    assert [request.token_ids for request in samples] == [[5, 5]] * 2
    assert pool.num_free == pool.num_blocks and scheduler.num_unfinished == 0


def test_a_given_answer_finds_its_prompt_remembered_up_to_the_token_that_predicts_it():
    _, scheduler = make_scheduler(prefixes=True)
    prompt = make_sequence(0, 9).prompt
    for targets, num_cached in (((7,), 0), ((8, 9), 8)):
        before = scheduler.stats.num_cached_prefill_tokens
        submit(scheduler, ScoredRequest(prompt, targets))
        step = scheduler.schedule()
        assert scheduler.stats.num_cached_prefill_tokens - before == num_cached
        assert step.samples == () and [list(chunk.scored_positions) for chunk in step.chunks] == [
            [*range(8, 8 + len(targets))]
        ]
        [finished] = scheduler.commit(step, [], never, [TokenScore(-1.0, False)] * len(targets))
        assert len(finished.scores) == len(targets) and finished.blocks == []


def test_few_places_are_scored_in_one_step(monkeypatch):
    monkeypatch.setattr("cpinfer.engine.scheduler.MAX_SCORED_POSITIONS", 3)
    _, scheduler = make_scheduler()
    submit(scheduler, ScoredRequest(make_sequence(0, 6).prompt, tuple(range(7))), make_sequence(1, 5))
    places = []
    while (step := scheduler.schedule()) is not None:
        places.append([place for chunk in step.chunks for place in chunk.scored_positions])
        scheduler.commit(step, tokens(step), lambda request: True, [TokenScore(0.0, False)] * len(places[-1]))
    assert places == [[5, 6, 7], [8, 9, 10], [11]]


def test_to_preempt_many_costs_the_same_for_each():
    def cost(num_sequences):
        """Every second sequence grows, in a home that is full; the others are in the other home, and need nothing."""
        _, scheduler = make_scheduler(num_sequences, num_sequences, 10 * num_sequences, num_homes=2)
        for index in range(num_sequences):
            submit(scheduler, make_sequence(index, 5 if index % 2 else 8))
        advance(scheduler)
        lines = lines_run(scheduler.schedule, within="scheduler.py")
        assert scheduler.stats.num_preemptions >= num_sequences // 6
        return lines / num_sequences

    assert cost(1024) <= 1.1 * cost(64)
