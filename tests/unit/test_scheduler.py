"""The scheduler: who runs next under a pool of blocks and a budget of tokens. No tensor, no model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledToken, Sequence
from cpinfer.engine.scheduler import Scheduler
from cpinfer.layout.pool import BlockPool
from cpinfer.layout.shards import KVSharding

SHARDING = KVSharding(num_shards=1, interleave=4, block_size=4)


def never(sequence):
    return False


def make_sequence(index, prompt_len, max_new_tokens=4, sample_index=0):
    prompt = Prompt(index, f"p{index}", tuple(range(1, prompt_len + 1)))
    return Sequence(prompt, sample_index, SamplingParams(), max_new_tokens)


def make_scheduler(num_blocks=100, max_num_seqs=100, max_num_batched_tokens=1000, sharding=SHARDING):
    pool = BlockPool(num_blocks)
    return pool, Scheduler(pool, sharding, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def tokens(step, token_id=5):
    return [SampledToken(token_id, -1.0, -0.5) for _ in step.sequences]


def indices(step):
    return [s.prompt.index for s in step.sequences]


def run(scheduler, stops=never, watch=lambda step: None):
    """All steps to the end; the finished sequences in the order in which they finished."""
    finished = []
    while (step := scheduler.schedule()) is not None:
        watch(step)
        finished += scheduler.commit(step, tokens(step), stops)
    return finished


def test_nothing_to_do_is_no_step():
    assert make_scheduler()[1].schedule() is None


def test_a_sequence_is_prefilled_once_and_then_decoded_to_its_end():
    pool, scheduler = make_scheduler()
    sequence = make_sequence(0, prompt_len=6, max_new_tokens=3)
    scheduler.add(sequence)
    kinds = []
    finished = run(scheduler, watch=lambda step: kinds.append(step.is_prefill))
    assert kinds == [True, False, False]
    assert finished == [sequence] and sequence.finish_reason == "length" and len(sequence.sampled) == 3
    assert pool.num_free == 100 and sequence.blocks == []


def test_one_new_token_needs_no_decode_step():
    _, scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 6, max_new_tokens=1))
    kinds = []
    run(scheduler, watch=lambda step: kinds.append(step.is_prefill))
    assert kinds == [True]


def test_a_sequence_takes_the_blocks_of_its_longest_end_when_it_is_admitted():
    for prompt_len, new, blocks in ((4, 1, 1), (4, 2, 2), (5, 4, 2), (5, 5, 3)):
        pool, scheduler = make_scheduler(num_blocks=10)
        sequence = make_sequence(0, prompt_len, new)
        scheduler.add(sequence)
        scheduler.schedule()
        assert len(sequence.blocks) == blocks and pool.num_free == 10 - blocks


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


def test_prompts_of_a_step_fit_the_token_budget():
    _, scheduler = make_scheduler(max_num_batched_tokens=10)
    for index, prompt_len in enumerate((4, 6, 1, 10)):
        scheduler.add(make_sequence(index, prompt_len, max_new_tokens=1))
    steps = []
    run(scheduler, watch=lambda step: steps.append(indices(step)))
    assert steps == [[0, 1], [2], [3]]


def test_no_more_than_max_num_seqs_run_at_once():
    _, scheduler = make_scheduler(max_num_seqs=2)
    for index in range(5):
        scheduler.add(make_sequence(index, 2, max_new_tokens=3))
    sizes = []
    run(scheduler, watch=lambda step: sizes.append(len(step.sequences)))
    assert max(sizes) == 2 and sum(sizes) == 15


def test_a_token_budget_below_max_num_seqs_bounds_the_decode_steps_too():
    _, scheduler = make_scheduler(max_num_seqs=100, max_num_batched_tokens=3)
    for index in range(7):
        scheduler.add(make_sequence(index, 1, max_new_tokens=4))
    sizes = []
    run(scheduler, watch=lambda step: sizes.append(len(step.sequences)))
    assert max(sizes) == 3 and sum(sizes) == 28


def test_a_freed_place_is_filled_before_the_batch_advances():
    _, scheduler = make_scheduler(max_num_seqs=2)
    for index, new in enumerate((1, 4, 4)):
        scheduler.add(make_sequence(index, 2, max_new_tokens=new))
    steps = []
    run(scheduler, watch=lambda step: steps.append((step.is_prefill, indices(step))))
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
    scheduler.add(make_sequence(0, 8, max_new_tokens=1))
    scheduler.add(make_sequence(1, 8, max_new_tokens=1))
    step = scheduler.schedule()
    assert indices(step) == [0] and pool.num_free == 0
    scheduler.commit(step, tokens(step), never)
    assert pool.num_free == 2


def test_abort_frees_what_runs_and_forgets_what_waits():
    pool, scheduler = make_scheduler(num_blocks=4)
    for index in range(3):
        scheduler.add(make_sequence(index, 8, max_new_tokens=1))
    scheduler.schedule()
    assert (pool.num_free, scheduler.num_unfinished) == (0, 3)
    scheduler.abort_all()
    pool.check_integrity()
    assert (pool.num_free, scheduler.num_unfinished) == (4, 0)
    assert scheduler.schedule() is None
    scheduler.abort_all()  # again is harmless
    assert pool.num_free == 4


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


def test_a_prompt_above_the_token_budget_is_refused_with_numbers():
    _, scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence(0, 8))
    with pytest.raises(ValueError, match="'p1': 9 tokens exceed the 8 tokens of a step"):
        scheduler.add(make_sequence(1, 9))


REQUESTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), max_size=12)
SHARDINGS = st.builds(KVSharding, st.integers(1, 3), st.sampled_from([1, 4, 6]), st.just(4))


@given(
    requests=REQUESTS,
    sharding=SHARDINGS,
    num_blocks=st.integers(5, 12),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(12, 30),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_ends_once_and_nothing_leaks(requests, sharding, num_blocks, max_num_seqs, budget):
    """Requests of (prompt length, longest answer, length at which it stops) through a small pool."""
    pool, scheduler = make_scheduler(num_blocks, max_num_seqs, budget, sharding)
    sequences = [make_sequence(i, p, new) for i, (p, new, _) in enumerate(requests)]
    stop_at = {i: at for i, (_, _, at) in enumerate(requests)}
    for sequence in sequences:
        scheduler.add(sequence)
    admitted = []

    def watch(step):
        pool.check_integrity()
        held = [block for s in sequences for block in s.blocks]
        assert len(held) == len(set(held)) == num_blocks - pool.num_free
        assert 1 <= len(step.sequences) <= max_num_seqs
        num_tokens = sum(len(s.prompt.token_ids) if step.is_prefill else 1 for s in step.sequences)
        assert num_tokens <= budget
        for s in step.sequences:
            assert sharding.num_blocks(len(s.prompt.token_ids) + len(s.sampled)) <= len(s.blocks) or not s.sampled
        if step.is_prefill:
            admitted.extend(indices(step))

    finished = run(scheduler, stops=lambda s: len(s.sampled) == stop_at[s.prompt.index], watch=watch)
    assert admitted == list(range(len(sequences)))
    assert sorted(s.prompt.index for s in finished) == admitted
    for s, (_, new, at) in zip(sequences, requests, strict=True):
        assert len(s.sampled) == min(new, at)
        assert s.finish_reason == ("stop" if at <= new else "length")
    assert pool.num_free == num_blocks and scheduler.num_unfinished == 0


@given(requests=REQUESTS, num_blocks=st.integers(5, 12), max_num_seqs=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_two_schedulers_fed_alike_decide_alike(requests, num_blocks, max_num_seqs):
    stop_at = [at for _, _, at in requests]

    def decisions():
        _, scheduler = make_scheduler(num_blocks, max_num_seqs, 12)
        for i, (p, new, _) in enumerate(requests):
            scheduler.add(make_sequence(i, p, new))
        steps = []
        run(
            scheduler,
            stops=lambda s: len(s.sampled) == stop_at[s.prompt.index],
            watch=lambda step: steps.append(
                (step.is_prefill, [(s.prompt.index, tuple(s.blocks)) for s in step.sequences])
            ),
        )
        return steps

    assert decisions() == decisions()
