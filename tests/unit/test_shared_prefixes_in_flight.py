"""Requests that begin alike: what one computes the others wait for, and what is cached is not charged again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step import Step
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.shards import KVSharding

SHARDING = KVSharding(num_shards=1, interleave=16, block_size=16)
DOCUMENT = tuple(range(2048))


def scheduler_of(num_blocks: int = 10_000, num_homes: int = 1, budget: int = 2048, caches: bool = True) -> Scheduler:
    homes = [KVHome(num_blocks, SHARDING, enable_prefix_caching=caches) for _ in range(num_homes)]
    return Scheduler(homes, SHARDING, max_num_seqs=256, max_num_batched_tokens=budget)


def request(index: int, prefix: Sequence[int], num_own: int = 32, max_new_tokens: int = 16) -> SampledRequest:
    own = range(10_000 + 1000 * index, 10_000 + 1000 * index + num_own)
    return SampledRequest(Prompt(index, str(index), (*prefix, *own)), 0, SamplingParams(), max_new_tokens)


def run(scheduler: Scheduler) -> list[Step]:
    steps = []
    while (step := scheduler.schedule()) is not None:
        steps.append(step)
        scheduler.commit(step, [SampledToken(5, -1.0, -0.5)] * len(step.samples), lambda request: False)
        scheduler.check_integrity()
    return steps


@pytest.mark.parametrize("num_homes", [1, 2])
def test_questions_about_one_document_compute_it_once_in_each_home(num_homes: int) -> None:
    scheduler = scheduler_of(num_homes=num_homes)
    for i in range(32):
        scheduler.add(request(i, DOCUMENT))
    run(scheduler)
    assert scheduler.stats.num_computed_prefill_tokens == num_homes * len(DOCUMENT) + 32 * 32


def test_without_a_cache_nobody_waits() -> None:
    scheduler = scheduler_of(caches=False, budget=4200)
    for i in range(2):
        scheduler.add(request(i, DOCUMENT))
    step = scheduler.schedule()
    assert step is not None and len(step.chunks) == 2


def test_for_little_in_common_nobody_waits() -> None:
    """The first 16 tokens of 63 are no reason to leave a step half empty."""
    scheduler = scheduler_of()
    for i in range(8):
        scheduler.add(request(i, DOCUMENT[:16], num_own=47))
    step = scheduler.schedule()
    assert step is not None and len(step.chunks) == 8


def test_what_is_in_common_is_there_before_the_first_prompt_is_done() -> None:
    """A prompt that goes on for long behind the document keeps nobody waiting."""
    scheduler = scheduler_of(budget=1024)
    scheduler.add(request(0, DOCUMENT, num_own=1000))
    scheduler.add(request(1, DOCUMENT, num_own=200))
    steps = run(scheduler)
    begins = [
        next(i for i, step in enumerate(steps) if any(c.prefill.requests[0] is r for c in step.chunks))
        for r in {id(c.prefill.requests[0]): c.prefill.requests[0] for s in steps for c in s.chunks}.values()
    ]
    assert begins == [0, 2]
    assert scheduler.stats.num_computed_prefill_tokens == len(DOCUMENT) + 1200


def test_who_waits_for_a_prefill_that_is_aborted_computes_it() -> None:
    scheduler = scheduler_of(budget=512)
    first, second = request(0, DOCUMENT), request(1, DOCUMENT)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step is not None and len(step.chunks) == 1
    scheduler.commit(step, [], lambda request: False)
    scheduler.abort([first])
    scheduler.check_integrity()
    run(scheduler)
    assert second.finish_reason == "length"
    assert scheduler.stats.num_computed_prefill_tokens == len(DOCUMENT) + 32


def test_a_cached_prefix_is_not_charged_as_if_it_were_new() -> None:
    """In a pool of one and a half documents and all answers, those who read it run side by side."""
    document = tuple(range(4096))
    num_answers = 16 * 3  # blocks of 32 + 16 tokens
    scheduler = scheduler_of(num_blocks=4096 // 16 * 3 // 2 + num_answers)
    scheduler.add(request(99, document))
    run(scheduler)
    for i in range(16):
        scheduler.add(request(i, document))
    steps = run(scheduler)
    assert len(steps) == 16, "one step for all prompts, and one for each other token"
    assert scheduler.stats.num_preemptions == 0


def test_a_prefix_that_nobody_reads_is_still_counted_where_it_is_taken() -> None:
    """Idle blocks are room for others, but not for the prompt whose prefix they are."""
    scheduler = scheduler_of(num_blocks=14)
    scheduler.add(request(0, DOCUMENT[:160], num_own=16, max_new_tokens=1))
    run(scheduler)  # 11 blocks are remembered, 10 of them of the prefix
    scheduler.add(request(1, DOCUMENT[:160], num_own=48, max_new_tokens=1))
    scheduler.add(request(2, (), num_own=16, max_new_tokens=1))
    step = scheduler.schedule()
    assert step is not None and [c.prefill.requests[0].prompt.index for c in step.chunks] == [1, 2]
    scheduler.check_integrity()


def test_a_long_prompt_that_waits_is_hashed_once() -> None:
    scheduler = scheduler_of(num_blocks=2048 // 16 + 8)
    scheduler.add(request(0, DOCUMENT))
    step = scheduler.schedule()
    waiting = request(1, tuple(range(5000, 5000 + 2048)))
    scheduler.add(waiting)
    assert step is not None
    for _ in range(3):
        scheduler.commit(step, [SampledToken(5, -1.0, -0.5)] * len(step.samples), lambda request: False)
        step = scheduler.schedule()
        assert step is not None
        keys = list(waiting.prefix_keys)
    assert all(a is b for a, b in zip(keys, waiting.prefix_keys, strict=True)) and len(keys) == 130


def test_a_kept_request_that_gives_way_leaves_no_room_for_what_its_prefix_already_was() -> None:
    """Its blocks become a prefix that nobody reads: the very one that the waiting prompt begins with."""
    sharding = KVSharding(num_shards=1, interleave=1, block_size=2)
    scheduler = Scheduler([KVHome(5, sharding, enable_prefix_caching=True)], sharding, 1, 100)
    for i in (0, 1):
        scheduler.add(SampledRequest(Prompt(i, str(i), (1, 1)), 0, SamplingParams(), 1, keeps_kv=True))
    long = SampledRequest(Prompt(2, "2", (1,) * 9), 0, SamplingParams(), 1)
    scheduler.add(long)
    run(scheduler)
    assert long.finish_reason == "length"
