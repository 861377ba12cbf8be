"""The loop over steps, with a runner that only counts: what it yields, and how it ends when its consumer leaves."""

import gc
import weakref

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken, ScoredRequest, TokenScore
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step_loop import StepLoop
from cpinfer.engine.step_runner import StepOutput
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import EngineFaultError, StreamEndedError
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.shards import KVSharding
from cpinfer.logs import RankLogger

SHARDING = KVSharding(1, 4, 4)

LOG = RankLogger("cpinfer.engine.step_loop")


class Steps:
    """Stands in for a step runner: every step samples token 5; `fail` is raised in the step of that number."""

    def __init__(self, fail=None, at=0):
        self.fail, self.at = fail, at
        self.leaves, self.events = [], []

    def begin(self):
        self.events.append("begin")

    def run(self, step, *, leaves):
        self.leaves.append(leaves)
        if self.fail is not None and len(self.leaves) == self.at:
            raise self.fail
        scores = [TokenScore(-1.0, True) for chunk in step.chunks for _ in chunk.scored_positions]
        return StepOutput([SampledToken(5, -1.0, -1.0) for _ in step.samples], scores)

    def copy_blocks(self, pairs):
        self.events.append(("copy", len(pairs)))

    def clear_cache(self):
        self.events.append("clear")


def loop_of(steps, num_ranks=1, lens=(2, 4, 6)):
    """A loop over samples that end after so many tokens, and the home whose blocks they take."""
    home = KVHome(50, SHARDING, enable_prefix_caching=False)
    scheduler = Scheduler([home], SHARDING, 8, 64)
    for i, length in enumerate(lens):
        prompt = Prompt(i, str(i), (i, 1, 2, 3, 4))
        scheduler.add(SampledRequest(prompt, 0, SamplingParams(max_new_tokens=length), length))
    return StepLoop(scheduler, steps, StopChecker((), None), 0, num_ranks, LOG), home


def test_requests_come_as_they_finish_with_their_times_and_the_last_when_all_has_ended():
    loop, home = loop_of(Steps())
    assert not loop.is_open and not loop.is_cut
    for index, request in enumerate(loop.finished):
        is_last = index == 2
        assert request.prompt.index == index and len(request.sampled) == request.max_new_tokens
        assert request.submitted_s <= request.first_token_s <= request.finished_s
        assert loop.is_open == loop.is_cut == (not is_last)
    assert index == 2 and home.pool.num_free == 50


def test_what_is_sampled_and_what_is_scored_finish_in_one_loop():
    home = KVHome(50, SHARDING, enable_prefix_caching=False)
    scheduler = Scheduler([home], SHARDING, 8, 64)
    scored = ScoredRequest(Prompt(0, "0", (1, 2)), (3, 4))
    sampled = SampledRequest(Prompt(1, "1", (1, 2)), 0, SamplingParams(), 3)
    scheduler.add(scored)
    scheduler.add(sampled)
    finished = list(StepLoop(scheduler, Steps(), StopChecker((), None), 0, 1, LOG).finished)
    assert finished == [scored, sampled] and len(scored.scores) == 2 and scored.result().is_greedy


def test_alone_a_consumer_that_leaves_ends_the_loop_at_once():
    steps = Steps()
    loop, home = loop_of(steps)
    next(loop.finished)
    num_steps = len(steps.leaves)
    loop.finished.close()
    assert len(steps.leaves) == num_steps and home.pool.num_free == 50
    assert not loop.is_open and not loop.is_cut and loop.left_alone is None


@pytest.mark.parametrize("who_left, is_left_alone", [((0,), True), ((0, 1), False)])
def test_a_consumer_that_leaves_tells_the_others_in_the_next_step(who_left, is_left_alone):
    ended = StreamEndedError("stopped", who_left)
    steps = Steps(fail=ended, at=3)
    loop, home = loop_of(steps, num_ranks=2)
    next(loop.finished)  # after two steps
    loop.finished.close()
    assert steps.leaves == [False, False, True]
    assert (loop.left_alone is ended) == is_left_alone
    assert loop.is_cut == is_left_alone and not loop.is_open
    assert (home.pool.num_free == 50) != is_left_alone


def test_a_fault_clears_the_cache_and_leaves_the_loop_cut():
    steps = Steps(fail=EngineFaultError("logits are not finite"), at=2)
    loop, _ = loop_of(steps)
    with pytest.raises(EngineFaultError, match="not finite"):
        list(loop.finished)
    assert steps.events[-1] == "clear" and loop.is_cut and not loop.is_open


@pytest.mark.parametrize("take", [list, next, lambda finished: None], ids=["all", "one", "none"])
def test_when_it_has_ended_it_holds_on_to_no_memory_of_the_pool(take):
    steps = Steps()
    pool = weakref.ref(steps)
    loop, _ = loop_of(steps)
    del steps
    take(loop.finished)
    assert take is list or pool() is not None
    loop.finished.close()
    gc.collect()
    assert pool() is None
