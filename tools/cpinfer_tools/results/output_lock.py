"""Locks on an output, so that two runs never write one file: held by a process, and gone with it after `kill -9` too.

`flock`, which Linux gives to NFS as well (as a lock of the whole file on the server), and which also keeps two runs of
one process apart. The kernel releases it with the last descriptor; no descriptor here outlives an `exec`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpinfer.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_path(path: Path) -> Path:
    """The lock file of an output, beside the file that links lead to: one for all names of it."""
    real = path.resolve()
    return real.with_name(real.name + ".lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an output for the length of the block, with a folder for both. UserError when another has it."""
    lock = lock_path(path)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(lock, path)
    except OSError as error:
        raise UserError(f"output {path} cannot be opened: {error.strerror} ({error.filename or lock}).") from error
    try:
        yield
    finally:
        # While it is held: who opened this file before finds another in its place, and tries again.
        with suppress(OSError):
            if is_at(descriptor, lock):
                lock.unlink()
        close_unlocked(descriptor)


def _open_locked(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            take_lock(descriptor, path)
            if is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def take_lock(descriptor: int, path: Path) -> None:
    """Lock an open file until it is closed. UserError when another has it, or when the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"output {path} is being written by another run. Wait for its end, or use another.") from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UserError(
                f"output {path}: its file system has no locks ({error.strerror}), so nothing keeps two runs from "
                "writing one file. Use an output on one that has."
            ) from error
        raise


def close_unlocked(descriptor: int) -> None:
    """Close a locked file. Unlocked by word: a child that was forked in between has the same file open."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        there, here = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
