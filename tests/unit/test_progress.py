"""Signs of life: when lines come, what they say, and that a terminal has a bar and the other ranks nothing."""

import doctest
import io
import itertools
import time

import pytest

from cpinfer_tools import progress
from cpinfer_tools.progress import Lines, Progress, Schedule, Tokens, loading, progress_line


def test_examples_hold():
    found = doctest.testmod(progress)
    assert found.attempted >= 3 and not found.failed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def due_times(until_s, tick_s=0.5):
    schedule = Schedule(100.0)
    ticks = [tick_s * i for i in range(int(until_s / tick_s))]
    return [now_s for now_s in ticks if schedule.is_due(100.0 + now_s)]


def test_the_first_line_comes_after_three_seconds_and_then_one_every_ten():
    assert due_times(60) == [3, 13, 23, 33, 43, 53]


def test_lines_back_off_in_a_long_run():
    times = due_times(24 * 3600, tick_s=1.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == sorted(gaps) and min(gaps) == 10 and max(gaps) == 300
    assert len(times) < 400


def test_a_line_says_how_much_is_left_only_where_something_tells_it():
    assert progress_line(16, 64, "sample", 40.0).endswith("; about 120 s left")
    assert "left" not in progress_line(0, 64, "sample", 30.0, Tokens(100, 9))
    assert "left" not in progress_line(0, 64, "sample", 30.0, Tokens(0, 9), most_tokens=1000)
    assert "0 s left" in progress_line(64, 64, "sample", 30.0)


def test_lines_come_by_the_clock_while_no_sample_is_finished(monkeypatch):
    """What a user without a terminal waits for: tokens are counted before the first sample ends."""
    now, told, stream = [0.0], [Tokens(0, 0)], io.StringIO()
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    with Progress(
        "rollout", 4, "sample", shown=True, tokens=lambda: told[0], where=" (replica 0 of 2)", stream=stream,
        clock=lambda: now[0],
    ) as shown:  # fmt: skip
        told[0] = Tokens(50, 700)
        wait_for(lambda: False, 0.05)
        assert stream.getvalue() == ""  # nothing is due yet
        now[0] = 5.0
        wait_for(stream.getvalue)
        shown.update(reward="0.5")
        now[0] = 20.0
        wait_for(lambda: stream.getvalue().count("\n") == 2)
    now[0] = 1000.0
    first, second = stream.getvalue().splitlines()
    assert (
        first == "rollout: 0/4 samples after 5 s; 50 tokens generated, 10/s; 700 of prompts computed (replica 0 of 2)"
    )
    assert second.startswith("rollout: 1/4 samples after 20 s;") and "; reward 0.5; about 60 s left" in second


def wait_for(what, timeout_s=5.0):
    until_s = time.monotonic() + timeout_s
    while not what() and time.monotonic() < until_s:
        time.sleep(0.002)


def test_a_terminal_has_a_bar_and_no_lines():
    stream = Terminal()
    with Progress("rollout", 2, "sample", shown=True, stream=stream) as shown:
        shown.update(reward="0.5")
        assert shown._lines is None
    assert "sample" in stream.getvalue() and "rollout:" not in stream.getvalue() and "reward=0.5" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_ranks_that_are_not_to_speak_write_nothing(stream):
    with Progress("rollout", 2, "sample", shown=False, stream=stream) as shown:
        shown.update()
    with loading("rollout", "a model", shown=False, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_loading_says_what_it_loads_that_it_still_does_and_how_long_it_took(monkeypatch):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    with loading("rollout", "a model: 0.01 GiB in float32", shown=True, stream=stream, clock=lambda: now[0]):
        assert stream.getvalue() == "rollout: loading a model: 0.01 GiB in float32\n"
        now[0] = 4.0
        wait_for(lambda: stream.getvalue().count("\n") == 2)
        now[0] = 12.34
    assert stream.getvalue().splitlines()[1:] == ["rollout: still loading after 4 s", "rollout: loaded in 12.3 s"]


def test_loading_says_how_much_is_read_and_how_fast(monkeypatch):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    with loading("rollout", "a model", shown=True, stream=stream, clock=lambda: now[0]) as loaded:
        loaded.on_read(500_000_000, 2_000_000_000)
        assert loaded.load_s is None
        now[0] = 4.0
        wait_for(lambda: stream.getvalue().count("\n") == 2)
        loaded.on_read(1_900_000_000, 1_900_000_000)
        now[0] = 9.5
    assert stream.getvalue().splitlines()[1:] == [
        "rollout: 0.5 of 2 GB of weights read after 4 s, 0.12 GB/s",
        "rollout: loaded in 9.5 s, 1.9 GB of weights read",
    ]
    assert loaded.load_s == 9.5


def test_on_a_terminal_what_is_read_is_a_bar_with_bytes_and_rate():
    stream = Terminal()
    with loading("rollout", "a model", shown=True, stream=stream) as loaded:
        loaded.on_read(500_000_000, 2_000_000_000)
        loaded._bar.refresh()
        shown = stream.getvalue()
    assert "500M/2.00G" in shown and "B/s" in shown and "25%" in shown


def test_ranks_that_do_not_speak_know_how_long_it_took():
    now, stream = [0.0], io.StringIO()
    with loading("rollout", "a model", shown=False, stream=stream, clock=lambda: now[0]) as loaded:
        loaded.on_read(1, 2)
        now[0] = 3.0
    assert loaded.load_s == 3.0 and stream.getvalue() == ""


def test_weights_that_do_not_load_are_not_said_to_be_loaded():
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), loading("rollout", "a model", shown=True, stream=stream):
        raise ZeroDivisionError
    assert "loaded" not in stream.getvalue()


def test_a_log_that_nobody_reads_any_more_ends_the_lines_not_the_run(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    now = [0.0]
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    lines = Lines(lambda after_s: "x", Closed(), lambda: now[0])
    lines.start()
    now[0] = 10.0
    wait_for(lambda: not lines._thread.is_alive())
    assert not lines._thread.is_alive()
    lines.stop()
