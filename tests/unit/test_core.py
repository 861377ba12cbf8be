"""Requests and steps of an engine, with a runner that only counts: what ends when, and what consumers leave behind."""

import gc
import weakref

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.agreement import Says
from cpinfer.engine.core import Batch, EngineCore
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken, ScoredRequest, TokenScore
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step_runner import StepOutput
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import EngineFaultError, StreamEndedError
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.shards import KVSharding
from cpinfer.logs import RankLogger

SHARDING = KVSharding(1, 4, 4)

LOG = RankLogger("cpinfer.engine.core")


class Steps:
    """Stands in for a step runner: every step samples token 5; `fail` is raised in the step of that number."""

    def __init__(self, fail=None, at=0):
        self.fail, self.at = fail, at
        self.said, self.events = [], []

    def begin(self):
        self.events.append("begin")

    def run(self, step, says):
        self.said.append(says)
        if self.fail is not None and len(self.said) == self.at:
            raise self.fail
        scores = [TokenScore(-1.0, True) for chunk in step.chunks for _ in chunk.scored_positions]
        return StepOutput([SampledToken(5, -1.0, -1.0) for _ in step.samples], scores)

    def copy_blocks(self, pairs):
        self.events.append(("copy", len(pairs)))

    def clear_cache(self):
        self.events.append("clear")

    def end(self):
        pass


def core_of(num_ranks=1, num_blocks=50):
    """A core without requests, and the home whose blocks they take."""
    home = KVHome(num_blocks, SHARDING, enable_prefix_caching=False)
    return EngineCore(Scheduler([home], SHARDING, 8, 64), StopChecker((), None), 0, num_ranks, LOG), home


def batch_of(*lens, first=0):
    """Samples that end after so many tokens."""
    return Batch(
        [
            SampledRequest(Prompt(i, str(i), (i, 1, 2, 3, 4)), 0, SamplingParams(max_new_tokens=length), length)
            for i, length in enumerate(lens, start=first)
        ]
    )


def run(core, steps, batch):
    """All of a batch, in the order in which they ended."""
    core.submit(batch)
    ended = []
    while batch.num_unfinished:
        core.advance(steps)
        ended += batch.take()
    return ended


def test_requests_come_as_they_finish_with_their_times():
    core, home = core_of()
    batch = batch_of(2, 4, 6)
    assert run(core, Steps(), batch) == batch.requests
    for request in batch.requests:
        assert len(request.sampled) == request.max_new_tokens
        assert request.submitted_s <= request.first_token_s <= request.finished_s
    assert core.is_idle and not core.is_cut and home.pool.num_free == 50


def test_what_is_sampled_and_what_is_scored_finish_in_one_batch():
    core, _ = core_of()
    scored = ScoredRequest(Prompt(0, "0", (1, 2)), (3, 4))
    sampled = SampledRequest(Prompt(1, "1", (1, 2)), 0, SamplingParams(), 3)
    assert run(core, Steps(), Batch([scored, sampled])) == [scored, sampled]
    assert len(scored.scores) == 2 and scored.result().is_greedy


def test_a_step_advances_the_requests_of_all_batches_and_each_gets_its_own():
    core, home = core_of()
    steps, first, second = Steps(), batch_of(6, 2), batch_of(3, first=2)
    core.submit(first)
    core.advance(steps)  # both of the first have a token
    core.submit(second)
    while first.num_unfinished:
        core.advance(steps)
    assert len(steps.said) == 1 + 1 + 5  # a prefill each, and decode steps for both together
    assert second.num_unfinished == 0 and list(second.take()) == second.requests
    assert [r.max_new_tokens for r in first.take()] == [2, 6]
    assert core.is_idle and home.pool.num_free == 50 and steps.events.count("begin") == 1


def test_alone_a_consumer_that_leaves_ends_its_batch_at_once_and_no_other():
    core, home = core_of()
    steps, left, other = Steps(), batch_of(4, 6), batch_of(5, first=2)
    core.submit(left)
    core.submit(other)
    core.advance(steps)
    core.leave(left, lambda says: core.advance(steps, says))
    assert len(steps.said) == 1 and left.num_unfinished == 0 and not list(left.take())
    assert core.open_batches() == [other] and not core.is_cut and core.left_alone is None
    while other.num_unfinished:
        core.advance(steps)
    assert len(other.requests[0].sampled) == 5 and home.pool.num_free == 50


@pytest.mark.parametrize("who_left, is_left_alone", [((0,), True), ((0, 1), False)])
def test_a_consumer_that_leaves_tells_the_others_in_the_next_step(who_left, is_left_alone):
    ended = StreamEndedError("stopped", who_left)
    steps = Steps(fail=ended, at=3)
    core, home = core_of(num_ranks=2)
    batch, other = batch_of(4, 6), batch_of(5, first=2)
    core.submit(batch)
    core.submit(other)
    core.advance(steps)
    core.advance(steps)
    core.leave(batch, lambda says: core.advance(steps, says))
    assert steps.said == [Says.NOTHING, Says.NOTHING, Says.LEAVES]
    assert (core.left_alone is ended) == is_left_alone == core.is_cut
    if is_left_alone:
        core.reset()
        assert other.is_lost and core.is_idle
    else:
        while other.num_unfinished:  # the step that did not come to its end is run again
            core.advance(steps)
        assert len(other.requests[0].sampled) == 5 and home.pool.num_free == 50


def test_after_a_fault_the_cache_is_cleared_and_what_was_under_way_is_lost():
    steps = Steps(fail=EngineFaultError("logits are not finite"), at=2)
    core, _ = core_of()
    batch, other = batch_of(4, 6), batch_of(5, first=2)
    core.submit(batch)
    core.submit(other)
    core.advance(steps)
    with pytest.raises(EngineFaultError, match="not finite"):
        core.advance(steps)
    assert steps.events[-1] == "clear" and core.is_cut
    core.leave(
        batch, lambda says: core.advance(steps, says)
    )  # as its consumer's frame does, when the error passes through it
    assert len(steps.said) == 2 and core.is_cut
    core.reset()
    assert batch.is_lost and other.is_lost and core.is_idle and not core.is_cut
    assert core.homes[0].pool.num_free == 50
    fresh = batch_of(2)
    assert run(core, Steps(), fresh) == fresh.requests


def test_it_holds_on_to_no_memory_of_the_pool():
    steps = Steps()
    pool = weakref.ref(steps)
    core, _ = core_of()
    core.submit(batch_of(3))
    core.advance(steps)
    del steps
    gc.collect()
    assert pool() is None
