"""Who did not come is named by all who did, from signs of life alone, and in bounded time."""

import datetime
import threading
import time

import pytest
import torch
import torch.distributed as dist

from cpinfer.comm import rank_watch
from cpinfer.comm.rank_watch import PATIENCE_S, RankWatch, gloo_timeouts
from cpinfer.errors import EngineFaultError, PeerLostError, RanksMissingError

TIMED_OUT = "[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
CLOSED = "[pair.cc:553] Connection closed by peer [127.0.0.1]:26755"
RANKS = (0, 1, 2)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """One that all watches of this process share, with beats that are short enough for a test."""
    store = dist.HashStore()
    monkeypatch.setattr(rank_watch, "_own_store", lambda: store)
    for name, value in (("BEAT_S", 0.02), ("SILENT_S", 0.3)):
        monkeypatch.setattr(rank_watch, name, value)
    return store


class Rank:
    """One that is `at` a step in a thread of its own until `end` is set, and then raises what it was told to."""

    def __init__(self, rank, what="step 7", raises=None, **options):
        self.watch, self.end, self.error = RankWatch(rank, RANKS, "test", **options), threading.Event(), None
        self._what, self._raises = what, raises
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            with self.watch.at(self._what):
                self.end.wait()
                if self._raises is not None:
                    raise RuntimeError(self._raises)
        except RuntimeError as error:
            self.error = error

    def __enter__(self):
        self._running = self.watch.running()
        self._running.__enter__()
        self._thread.start()
        return self

    def finish(self):
        self.end.set()
        self._thread.join(timeout=10)
        return self.error

    def __exit__(self, *given):
        self.end.set()
        self._running.__exit__(None, None, None)


def seen_by(*watches):
    """When all of them have seen a sign of each rank."""
    until = time.monotonic() + 10
    while any(len(watch._known) < len(RANKS) for watch in watches):
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("message", [TIMED_OUT, CLOSED])
def test_a_rank_that_is_silent_is_named_by_each_that_waited(message):
    with Rank(0, raises=message) as first, Rank(1, raises=message) as second:
        with Rank(2):
            seen_by(first.watch, second.watch)
        # No sign of rank 2 from here on.
        first.end.set()
        errors = second.finish(), first.finish()
    for error in errors:
        assert isinstance(error, RanksMissingError) and error.ranks == (2,), error
        assert "step 7 did not end" in str(error) and "rank 2 (pid" in str(error) and "is silent" in str(error)
    assert isinstance(errors[0], PeerLostError)


def test_a_rank_that_runs_elsewhere_is_named_with_its_place():
    with Rank(0, raises=TIMED_OUT) as first, Rank(1, raises=TIMED_OUT) as second, Rank(2, "step 6"):
        seen_by(first.watch, second.watch)
        second.end.set()
        error = first.finish()
    assert error.ranks == (2,), error
    assert "runs, and has been in wait (" in str(error) and "at step 6" in str(error) and "silent" not in str(error)


def test_where_all_came_nobody_is_blamed():
    with Rank(0, raises=TIMED_OUT) as first, Rank(1, raises=TIMED_OUT) as second, Rank(2, raises=TIMED_OUT) as third:
        seen_by(first.watch, second.watch, third.watch)
        second.end.set()
        third.end.set()
        error = first.finish()
    assert error.ranks == () and "all ranks came" in str(error)


class StoppedStore:
    """What is left of a store whose process was stopped: nothing comes back."""

    def __init__(self, store, stopped):
        self._store, self._stopped = store, stopped

    def __getattr__(self, name):
        while self._stopped.is_set():
            time.sleep(0.01)
        return getattr(self._store, name)


def test_a_store_that_does_not_answer_names_the_rank_that_holds_it(store, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(rank_watch, "_own_store", lambda: StoppedStore(store, stopped))
    with Rank(0), Rank(1, raises=TIMED_OUT) as second, Rank(2):
        seen_by(second.watch)
        stopped.set()
        start_s = time.monotonic()
        error = second.finish()
        took_s = time.monotonic() - start_s
        stopped.clear()
    assert error.ranks == (0,) and "store does not answer: rank 0 (pid" in str(error), error
    assert took_s < 5


def test_errors_of_this_ranks_own_stay_what_they_are():
    for own in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), EngineFaultError("NaN"), KeyError("x")):
        watch = RankWatch(0, RANKS, "test")
        with watch.running(), pytest.raises(type(own)) as caught, watch.at("step 7"):
            raise own
        assert caught.value is own


def waits_here(seconds):
    """What passes for a collective in these tests: nothing is between this and the sleep."""
    time.sleep(seconds)


@pytest.mark.parametrize("lives", [False, True], ids=["silent", "at work"])
def test_where_nothing_raises_the_watch_tells_of_silent_ranks_alone(lives, monkeypatch):
    monkeypatch.setattr(rank_watch, "_IN_COLLECTIVES", __file__)
    told = []
    watch = RankWatch(0, RANKS, "test", told.append, stuck_s=60, overdue_s=0.05)
    with Rank(1) as second, watch.running(), watch.waiting(0.2), watch.at("step 7"):
        third = Rank(2)
        with third:
            seen_by(watch, second.watch)
            if lives:
                waits_here(1)
        if not lives:
            with pytest.raises(RanksMissingError), watch.at("step 8"):
                waits_here(1)
            watch._verdict = None
    assert [error.ranks for error in told] == ([] if lives else [(2,)])
    assert not told or "step 8 did not end within collective_timeout_s (0.2 s): rank 2" in str(told[0])


def test_a_rank_whose_watch_has_ended_it_has_come(monkeypatch):
    """Watches act one after another: who was ended by the first is not missing to the next."""
    monkeypatch.setattr(rank_watch, "_IN_COLLECTIVES", __file__)
    options = {"stuck_s": 60, "overdue_s": 0.05}
    first, second = RankWatch(0, RANKS, "test", lambda _: None, **options), Rank(1, raises=TIMED_OUT)
    with second:
        with first.running():
            with Rank(2):
                seen_by(first, second.watch)
            with pytest.raises(RanksMissingError), first.waiting(0.1), first.at("step 7"):
                waits_here(0.8)
        time.sleep(0.4)  # no sign of the first any more
        assert second.finish().ranks == (2,)


def test_ranks_whose_watches_call_the_roll_at_once_do_not_miss_each_other(monkeypatch):
    monkeypatch.setattr(rank_watch, "_IN_COLLECTIVES", __file__)
    told = []

    def wait_in_vain(watch):
        with pytest.raises(RanksMissingError), watch.waiting(0.1), watch.at("step 7"):
            waits_here(1.5)

    watches = [RankWatch(rank, RANKS, "test", told.append, stuck_s=60, overdue_s=0.05 * rank) for rank in (0, 1)]
    with watches[0].running(), watches[1].running():
        with Rank(2):
            seen_by(*watches)
        threads = [threading.Thread(target=wait_in_vain, args=(watch,)) for watch in watches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
    assert [error.ranks for error in told] == [(2,), (2,)]


@pytest.fixture
def group():
    """A default group of one rank, whose collectives wait 77 s."""
    wanted = datetime.timedelta(seconds=77)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=wanted)
    yield lambda: dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    dist.destroy_process_group()


def test_groups_wait_as_long_as_is_said_inside_the_block_alone(group):
    with pytest.raises(ZeroDivisionError), gloo_timeouts([0, 1], 5):
        assert group() == 5
        raise ZeroDivisionError
    assert group() == 77
    with gloo_timeouts([1], 5):  # some of its ranks are not of those that wait
        assert group() == 77


def test_where_kernels_are_built_groups_wait_longer(group):
    watch = RankWatch(0, (0,), "test")
    with watch.running(), watch.waiting(5):
        with watch.at("step 1", builds=True):
            assert group() == PATIENCE_S
        with watch.at("step 2"):
            assert group() == 5
    assert group() == 77
