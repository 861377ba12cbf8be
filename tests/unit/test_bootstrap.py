"""How long ranks wait for each other and for their launcher, and what they say when that is over."""

import datetime
import os
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from cpinfer.comm import bootstrap
from cpinfer.comm.bootstrap import Launch, default_group, die, end_with_launcher
from cpinfer.comm.losses import is_peer_loss, is_timeout
from cpinfer.comm.rank_watch import RankWatch
from cpinfer.comm.topology import new_group
from cpinfer.config import JobConfig
from cpinfer.errors import ModelChangedError, RanksDifferError, RanksMissingError

TIMED_OUT = "[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of what would have ended the process."""
    codes = []

    def exit_(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", exit_)
    monkeypatch.setattr(bootstrap, "PEER_GRACE_S", 0)
    monkeypatch.setattr(bootstrap, "OWN_ERROR_GRACE_S", 0)
    monkeypatch.setattr(bootstrap, "BEAT_S", 0)
    return codes


@pytest.mark.parametrize(
    "message",
    [
        TIMED_OUT,
        "[unbound_buffer.cc:129] Timed out waiting 4000ms for send operation to complete",
        "Application timeout caused pair closure",
        "wait timeout after 4000ms, keys: /default_pg/0//1//cpu//0/1",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600010 milliseconds",
    ],
)
def test_a_rank_that_does_not_come_is_told_from_one_that_is_gone(message):
    assert is_timeout(RuntimeError(message)) and not is_peer_loss(RuntimeError(message))
    assert not is_timeout(ValueError(message))


def test_an_error_of_this_ranks_own_is_no_timeout():
    assert not is_timeout(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_timeout(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))


def test_a_rank_that_waited_in_vain_says_so_without_a_traceback(ended, capsys):
    with pytest.raises(SystemExit):
        die(Launch(3, 1, 4), RuntimeError(TIMED_OUT + "\nException raised from waitRecv"), program="tool")
    said = capsys.readouterr().err
    assert ended == [1] and said.count("\n") == 1
    assert "tool: rank 3 ends because another rank did not come to a collective in time" in said
    assert "collective_timeout_s" in said and "4000ms" in said


@pytest.mark.parametrize(
    "error, said",
    [
        (RanksDifferError("ranks 0 and 1 differ in prompts. Nothing was run."), "tool: ranks 0 and 1 differ in"),
        (ModelChangedError("the model was put into training mode. Leave the block first."), "tool: rank 3: the model"),
    ],
)
def test_an_error_whose_message_says_it_all_has_no_traceback(error, said, ended, capsys):
    with pytest.raises(SystemExit):
        die(Launch(3, 1, 4), error, program="tool")
    told = capsys.readouterr().err
    assert ended == [1] and told.startswith(said) and told.count("\n") == 1


def test_an_error_that_nobody_expected_has_its_traceback(ended, capsys):
    with pytest.raises(SystemExit):
        die(Launch(3, 1, 4), KeyError("x"), program="tool")
    told = capsys.readouterr().err
    assert told.startswith("tool: rank 3 failed\n") and "KeyError: 'x'" in told


@pytest.fixture
def started(monkeypatch):
    """The timeouts of default groups that would have been made."""
    timeouts = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: timeouts.append(timeout))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return timeouts


def timeouts_of_new_groups():
    return c10d._get_default_timeout("gloo"), c10d.default_pg_nccl_timeout


def test_groups_that_frameworks_make_wait_as_long_as_the_default_group(started):
    before = timeouts_of_new_groups()
    with default_group(Launch(0, 0, 2), 7.0):
        assert timeouts_of_new_groups() == (datetime.timedelta(days=1),) * 2
    assert timeouts_of_new_groups() == before
    with pytest.raises(ZeroDivisionError), default_group(Launch(0, 0, 2), 7.0):
        raise ZeroDivisionError
    assert timeouts_of_new_groups() == before


def test_a_job_is_watched_for_as_long_as_its_config_says(started, monkeypatch):
    """Its collectives themselves wait for a replica that has more to do, and for checkpoints."""
    waiting = []
    monkeypatch.setattr(RankWatch, "waiting", lambda watch, timeout_s: waiting.append(timeout_s) or nullcontext())
    for timeout_s in (JobConfig().collective_timeout_s, 1e6):
        with default_group(Launch(0, 0, 2), timeout_s):
            pass
        assert waiting.pop() == timeout_s and started.pop() == datetime.timedelta(seconds=timeout_s)
    assert JobConfig().collective_timeout_s == 300


def test_ranks_that_begin_late_are_not_missed_however_short_the_timeout(started):
    """Imports take longer on some; one that never begins is missed all the same."""
    with default_group(Launch(0, 0, 2), 5.0):
        pass
    assert started == [datetime.timedelta(seconds=300)]


def test_a_group_of_a_job_waits_for_a_day(monkeypatch):
    init = dist.init_process_group
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda name, **keys: init(name, store=dist.HashStore(), rank=0, world_size=1, **keys),
    )
    with default_group(Launch(0, 0, 2), 5.0):
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(days=1)


def test_who_waited_names_those_that_did_not_come(ended, capsys):
    with pytest.raises(SystemExit):
        die(Launch(3, 1, 4), RanksMissingError("step 7 did not end: rank 1 is silent.", (1,)), program="tool")
    assert ended == [1]
    assert capsys.readouterr().err == "tool: rank 3 ends: step 7 did not end: rank 1 is silent.\n"


def test_a_group_of_ours_waits_as_long_as_the_jobs():
    wanted = datetime.timedelta(seconds=77)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=wanted)
    try:
        assert new_group([0])._get_backend(torch.device("cpu")).options._timeout == wanted
    finally:
        dist.destroy_process_group()


def watched(monkeypatch, environ, parents, launcher=7):
    """Watch a launcher while parents come as given, the last for good; whether anything watches."""
    seen = iter(parents)
    parent = [parents[-1]]
    monkeypatch.setattr(os, "getppid", lambda: next(seen, parent[0]))
    monkeypatch.setattr(bootstrap, "first_parent", lambda: launcher)
    monkeypatch.setattr(bootstrap, "_LAUNCHER_CHECK_S", 0.001)
    before = set(threading.enumerate())
    end_with_launcher(environ, program="tool")
    return [thread for thread in threading.enumerate() if thread not in before and thread.name == "launcher"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("parents", [[7, 7, 7, 1], [1]], ids=["later", "before it was watched"])
def test_a_rank_ends_when_its_launcher_has(parents, ended, monkeypatch, capsys):
    for thread in watched(monkeypatch, LAUNCHED, parents):
        thread.join(timeout=5)
    assert ended == [1]
    assert capsys.readouterr().err == "tool: rank 1 ends because its launcher ended\n"


@pytest.mark.parametrize("missing", sorted(LAUNCHED))
def test_a_process_that_no_launcher_started_may_lose_its_parent(missing, ended, monkeypatch):
    """A shell that leaves a job in the background; some clusters set the world's variables for all processes."""
    environ = {name: value for name, value in LAUNCHED.items() if name != missing}
    assert watched(monkeypatch, environ, [7, 1]) == [] and ended == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_launcher_that_is_the_first_process_of_a_container_is_a_launcher(ended, monkeypatch):
    """That the parent is process 1 says nothing; that it changes does."""
    [thread] = watched(monkeypatch, LAUNCHED, [1], launcher=1)
    thread.join(timeout=0.05)
    assert thread.is_alive() and ended == []
    monkeypatch.setattr(os, "getppid", lambda: 7)
    thread.join(timeout=5)
    assert not thread.is_alive() and ended == [1]
