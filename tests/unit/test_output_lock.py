"""One run at a time writes an output; a lock is gone with its holder, however that ended."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from cpinfer.errors import UserError
from cpinfer_tools.results.output_lock import lock_path, locked

HOLDER = "import sys, time; from pathlib import Path; from cpinfer_tools.results.output_lock import locked\n"
HOLDER += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "out.jsonl"


def test_a_second_run_is_refused_and_a_later_one_is_not(path):
    for _ in range(2):
        with (
            locked(path),
            pytest.raises(UserError, match=rf"output {path} is being written by another run"),
            locked(path),
        ):
            pass
    assert list(path.parent.iterdir()) == []


def test_all_names_of_one_file_share_a_lock(path):
    with locked(path):
        other = path.parent.parent / "link.jsonl"
        other.symlink_to(path)
        with pytest.raises(UserError, match="is being written by another run"), locked(other):
            pass


def test_a_killed_holder_leaves_no_lock(path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="is being written by another run"), locked(path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert lock_path(path).exists()
    with locked(path):
        pass
    assert not lock_path(path).exists()


def test_a_lock_on_a_file_that_is_no_longer_the_lock_file_is_not_taken_for_one(path, monkeypatch):
    """Another run opened it, then its holder removed it and ended."""
    lock = lock_path(path)
    opened = []
    flock = fcntl.flock

    def flock_of_a_removed_file(descriptor, how):
        flock(descriptor, how)
        opened.append(os.fstat(descriptor).st_ino)
        if len(opened) == 1:
            lock.unlink()

    monkeypatch.setattr(fcntl, "flock", flock_of_a_removed_file)
    with locked(path):
        assert len(opened) == 2 and lock.stat().st_ino == opened[-1]


def test_a_file_system_without_locks_is_named(path, monkeypatch):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="its file system has no locks"), locked(path):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be opened: .*file"), locked(tmp_path / "file" / "out.jsonl"):
        pass
