"""Which rank did not come: signs of life through the job's store, read when a collective has failed or waits too long.

Every rank writes a sign each `BEAT_S`: at what it is, and whether it waits for others. Nobody reads them while all is
well, so a step costs nothing. When a collective fails, the ranks that waited in it say so and read what the others say:

    writes no more                  stopped, swapping, ended, or its host is gone
    writes, and waits for nobody    stuck in other code, or slower than it may be: its place in that code is known
    writes that it waited too       it came

gloo ends a collective by itself when it has waited too long. NCCL ends the process, unless somebody aborts it before:
where a thread waits at one place for longer than it may, the watch calls the roll by itself.
"""

from __future__ import annotations

import datetime
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from cpinfer.comm.losses import is_peer_loss, is_timeout
from cpinfer.errors import RanksMissingError
from cpinfer.logs import RankLogger

T = TypeVar("T")

# How often a rank writes a sign, and after how long without a new one it counts as silent.
BEAT_S = 1.0
SILENT_S = 3.0
# How much later than a collective of gloo's the watch acts by itself: who raises an error knows the step.
OVERDUE_S = 3.0
# How long a rank may stay at one place while kernels build or checkpoints load, where `collective_timeout_s` is less.
PATIENCE_S = 1800.0

_CPINFER = str(Path(__file__).parents[1])
_IN_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
_SHARED_MEMORY = str(Path(__file__).with_name("shared_memory.py"))


class Watch(Protocol):
    """Who notices that ranks do not come."""

    def running(self) -> AbstractContextManager[None]:
        """A block in which signs of life are written. Inside another such block nothing changes."""
        ...

    def waiting(self, timeout_s: float) -> AbstractContextManager[None]:
        """A block inside `running` in which ranks wait `timeout_s` for each other, not as long as their groups say."""
        ...

    def at(self, what: str, *, builds: bool = False) -> AbstractContextManager[None]:
        """A block in which this rank is at `what`: RanksMissingError where a collective in it fails for want of others.

        `builds`: kernels may be built in it, on some ranks sooner than on others, who wait for `PATIENCE_S` at least.
        """
        ...


class NoWatch:
    """Of a rank that has nobody to wait for, and of threads of one process."""

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def waiting(self, timeout_s: float) -> AbstractContextManager[None]:
        return nullcontext()

    def at(self, what: str, *, builds: bool = False) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Sign:
    """What a rank last told of itself: at what it is, and for how many seconds (`same_s`) at which place in its code.

    `waits`: that place is a collective. `came`: one has failed there.
    """

    host: str
    pid: int
    num_beats: int = 0
    what: str = ""
    place: str = ""
    waits: bool = False
    same_s: float = 0.0
    came: bool = False


class RankWatch:
    """Signs of this process among `ranks`, and the roll that is called by them; its threads run inside `running` alone.

    Args:
        rank: this one.
        ranks: those that wait for each other, this one among them.
        name: tells several watches of a process apart.
        on_missing: called by the watch's thread where ranks are missing and no collective has said so. Default: tell it
            to the log, and abort what waits on CUDA.
        stuck_s: how long ranks that write signs may stay at one place before such a call; of ranks that a collective
            has failed to bring, none may.
        overdue_s: how much longer than ranks may take such a call waits, for somebody who knows more to raise an error.
        sets_timeouts: whether groups of these ranks wait as `waiting` says.
    """

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        name: str,
        on_missing: Callable[[RanksMissingError], object] | None = None,
        *,
        stuck_s: float = 0.0,
        overdue_s: float = OVERDUE_S,
        sets_timeouts: bool = True,
    ) -> None:
        self._rank, self._ranks, self._name = rank, list(ranks), name
        self._others = [other for other in ranks if other != rank]
        self._on_missing, self._stuck_s, self._sets_timeouts = on_missing or self._abort, stuck_s, sets_timeouts
        self._overdue_s = overdue_s
        self._known: dict[int, Sign] = {}
        self._lock = threading.Lock()  # of what the watched thread and ours both write
        self._num_beats, self._came = 0, False
        self._place: object = None
        self._since_s = 0.0
        self._what, self._thread_id = "", threading.main_thread().ident
        self._timeout_s: float | None = None
        self._mailbox: _Mailbox | None = None
        self._verdict: RanksMissingError | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """As `Watch` has it."""
        store = None if self._mailbox is not None else _own_store()
        if store is None:
            yield
            return
        self._came, self._verdict = False, None
        self._mailbox, ended = _Mailbox(store), threading.Event()
        threading.Thread(target=self._beat_until, args=(ended,), name="rank watch", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            self._mailbox.close()
            self._mailbox = None

    @contextmanager
    def at(self, what: str, *, builds: bool = False) -> Iterator[None]:
        """As `Watch` has it."""
        before = self._what, self._thread_id
        self._what, self._thread_id = what, threading.get_ident()
        timeout_s = max(self._timeout_s or 0.0, PATIENCE_S) if builds else self._timeout_s
        try:
            with self.waiting(timeout_s) if builds and timeout_s is not None else nullcontext():
                yield
            if self._verdict is not None:  # what an aborted collective leaves is no result
                raise self._verdict
        except RanksMissingError:
            raise
        except RuntimeError as error:
            if self._verdict is not None:
                raise self._verdict from error
            if self._mailbox is None or not (is_timeout(error) or is_peer_loss(error)):
                raise
            raise self._roll_call(error, timeout_s) from error
        finally:
            self._what, self._thread_id = before

    @contextmanager
    def waiting(self, timeout_s: float) -> Iterator[None]:
        """As `Watch` has it."""
        before_s, self._timeout_s = self._timeout_s, timeout_s
        try:
            with gloo_timeouts(self._ranks, timeout_s) if self._sets_timeouts else nullcontext():
                yield
        finally:
            self._timeout_s = before_s

    def _beat_until(self, ended: threading.Event) -> None:
        # Sooner while others are unknown: hosts and processes are for when the store has gone.
        while not ended.wait(BEAT_S if len(self._known) == len(self._ranks) else BEAT_S / 10):
            sign, timeout_s = self._beat(), self._timeout_s
            if timeout_s is None or not sign.waits or self._verdict is not None:
                continue
            if sign.same_s < timeout_s + self._overdue_s:
                continue
            self._verdict = self._overdue(timeout_s)
            if self._verdict is not None:
                self._on_missing(self._verdict)

    def _beat(self, *, came: bool = False) -> Sign:
        """Look where the watched thread is, and write it down."""
        now_s = time.monotonic()
        key, place, waits = place_of(sys._current_frames().get(self._thread_id or 0), is_async=_has_nccl())
        with self._lock:
            if key != self._place:
                self._place, self._since_s = key, now_s
            self._num_beats, self._came = self._num_beats + 1, came or self._came
            same_s = round(now_s - self._since_s, 1)
            sign = Sign(*_process(), self._num_beats, self._what, place, waits, same_s, self._came)
        mailbox = self._mailbox
        if mailbox is not None:
            mailbox.tell(lambda store: self._exchange(store, sign), can_wait=not came)
        return sign

    def _exchange(self, store: Any, sign: Sign) -> None:
        store.set(self._key(self._rank), json.dumps(asdict(sign)))
        if len(self._known) < len(self._ranks):
            self._known = self._read(store)

    def _roll_call(self, error: RuntimeError, timeout_s: float | None) -> RanksMissingError:
        """The error that names who did not come, where a collective has failed with `error`."""
        what = self._what or "a collective"
        self._beat(came=True)
        signs = self._signs_of_a_while()
        if signs is None:
            return _unreachable(what, self._known)
        silent, running = self._missing(*signs)
        within_s = None if is_peer_loss(error) else timeout_s
        return _missing_error(what, within_s, silent, running, {**self._known, **signs[1]}, error)

    def _overdue(self, timeout_s: float) -> RanksMissingError | None:
        """The same where this rank still waits; None when others go on, and may come."""
        what = self._what or "a collective"
        self._beat(came=True)  # no sign follows meanwhile, nor when this process has ended
        signs = self._signs_of_a_while()
        if signs is None:
            return _unreachable(what, self._known)
        silent, running = self._missing(*signs)
        running = [rank for rank in running if signs[1][rank].same_s >= self._stuck_s]
        waited_s = min((signs[1][rank].same_s for rank in self._others if rank in signs[1]), default=0.0)
        if not silent and not running and waited_s < max(timeout_s, self._stuck_s):
            self._came = False
            return None
        return _missing_error(what, timeout_s, silent, running, {**self._known, **signs[1]})

    def _missing(self, first: Mapping[int, Sign], last: Mapping[int, Sign]) -> tuple[list[int], list[int]]:
        """Ranks that are silent, and those that write signs and wait for nobody."""
        not_come = [rank for rank in self._others if not (rank in last and last[rank].came)]
        silent = [r for r in not_come if r not in first or last[r].num_beats == first[r].num_beats]
        return silent, [r for r in not_come if r not in silent and not last[r].waits]

    def _signs_of_a_while(self) -> tuple[dict[int, Sign], dict[int, Sign]] | None:
        """Signs before and after the time in which each rank that runs writes a new one; None without a store.

        Over sooner where all others came: there is nothing to wait for.
        """
        first = last = self._ask()
        until_s = time.monotonic() + SILENT_S
        while last is not None and time.monotonic() < until_s:
            if all(rank in last and last[rank].came for rank in self._others):
                break
            time.sleep(BEAT_S / 4)
            last = self._ask()
        return None if first is None or last is None else (first, last)

    def _ask(self) -> dict[int, Sign] | None:
        return None if self._mailbox is None else self._mailbox.ask(self._read, SILENT_S)

    def _read(self, store: Any) -> dict[int, Sign]:
        ranks = [rank for rank in self._ranks if store.check([self._key(rank)])]
        signs = store.multi_get([self._key(rank) for rank in ranks]) if ranks else []
        return {rank: Sign(**json.loads(sign)) for rank, sign in zip(ranks, signs, strict=True)}

    def _key(self, rank: int) -> str:
        return f"cpinfer/signs/{self._name}/{rank}"

    def _abort(self, missing: RanksMissingError) -> None:
        """Tell it, and end what waits on CUDA: whoever waits for it then raises the verdict. gloo ends by itself."""
        RankLogger(__name__, self._rank, len(self._ranks)).error("%s", missing)
        for group in _groups_within(self._ranks):
            for backend in _backends_of(group):
                if type(backend).__name__ == "ProcessGroupNCCL":
                    backend.abort()


class _Mailbox:
    """The job's store, asked by a thread of its own: where the process that holds it is stopped, that thread hangs."""

    def __init__(self, store: Any) -> None:
        self._store, self._is_gone = store, False
        self._letters: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._carry, name="rank watch's store", daemon=True).start()

    def tell(self, letter: Callable[[Any], object], *, can_wait: bool = True) -> None:
        """Have something done, later or not at all where another letter lies there and this `can_wait`."""
        if not self._is_gone and not (can_wait and not self._letters.empty()):
            self._letters.put((letter, Future()))

    def ask(self, letter: Callable[[Any], T], within_s: float) -> T | None:
        """What it gives; None where that takes too long, or the store has gone."""
        if self._is_gone:
            return None
        answer: Future[T] = Future()
        self._letters.put((letter, answer))
        try:
            return answer.result(within_s)
        except (RuntimeError, TimeoutError):
            return None

    def close(self) -> None:
        self._letters.put(None)

    def _carry(self) -> None:
        while (letter := self._letters.get()) is not None:
            do, answer = letter
            try:
                answer.set_result(do(self._store))
            except Exception as error:
                self._is_gone = True  # torch writes a page to stderr for each letter that it cannot deliver
                answer.set_exception(error)


def _own_store() -> Any:
    """The job's store by a connection of our own, since who waits for a key keeps a connection to itself."""
    if not dist.is_initialized():
        return None
    with suppress(RuntimeError, NotImplementedError, AttributeError):
        store: Any = c10d._get_default_store()
        return store.clone()
    return None


@contextmanager
def gloo_timeouts(ranks: Sequence[int], timeout_s: float) -> Iterator[None]:
    """A block in which a collective over gloo among some of `ranks` alone waits that long, whoever made its group.

    NCCL's groups are left alone: past their timeout NCCL ends the process, with whatever trains in it.
    """
    backends = [b for group in _groups_within(ranks) for b in _backends_of(group) if type(b) is dist.ProcessGroupGloo]
    before = [backend.options._timeout for backend in backends]
    for backend in backends:
        backend._set_default_timeout(datetime.timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        for backend, timeout in zip(backends, before, strict=True):
            backend._set_default_timeout(timeout)


def timeout_s(group: Any) -> float:
    """How long a collective of a group on CPU waits; of one that does not say, as long as torch's groups by default."""
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    timeout: datetime.timedelta = getattr(options, "_timeout", c10d.default_pg_timeout)
    return timeout.total_seconds()


def set_timeout(group: Any, timeout: datetime.timedelta) -> None:
    """How long collectives of a group wait from now on, over whatever they run."""
    for backend in _backends_of(group):
        backend._set_default_timeout(timeout)


def _groups_within(ranks: Sequence[int]) -> list[Any]:
    return [group for group in c10d._world.pg_map if set(dist.get_process_group_ranks(group)) <= set(ranks)]


def _backends_of(group: Any) -> list[Any]:
    return list({id(b): b for b in (group._get_backend(device) for device in group._device_types)}.values())


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _has_nccl() -> bool:
    return any("nccl" in str(names) for _, names in c10d._world.pg_backend_config.items())


def place_of(frame: FrameType | None, *, is_async: bool) -> tuple[object, str, bool]:
    """Where a thread is: a key that changes when it goes on, a place for people, and whether that is a collective.

    `is_async`: collectives return at once, and what waits for them are reads of the device in this package.
    """
    if frame is None:
        return None, "", False
    file = frame.f_code.co_filename
    waits = _is_collective(file) or (is_async and file.startswith(_CPINFER))
    callers = [frame, *([frame.f_back] if frame.f_back else [])]
    key = tuple((id(each), each.f_lasti) for each in callers)
    while _is_collective(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    return key, f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})", waits


def _is_collective(file: str) -> bool:
    return _IN_COLLECTIVES in file or file == _SHARED_MEMORY


def _named(ranks: Sequence[int], signs: Mapping[int, Sign]) -> str:
    """Ranks with their hosts and processes, those of one host together."""
    hosts: dict[str, list[str]] = {}
    for rank in ranks:
        host, pid = (signs[rank].host, f" (pid {signs[rank].pid})") if rank in signs else ("", "")
        hosts.setdefault(host, []).append(f"{rank}{pid}")
    where = {host: f" on host {host}" if host else " of an unknown host" for host in hosts}
    return " and ".join(f"rank{'s'[: len(its) - 1]} {', '.join(its)}{where[host]}" for host, its in hosts.items())


def _missing_error(
    what: str,
    within_s: float | None,
    silent: Sequence[int],
    running: Sequence[int],
    signs: Mapping[int, Sign],
    error: RuntimeError | None = None,
) -> RanksMissingError:
    parts = []
    if silent:
        verb = "is" if len(silent) == 1 else "are"
        parts.append(f"{_named(silent, signs)} {verb} silent: stopped, swapping, ended, or cut off")
    for rank in running:
        sign = signs[rank]
        at = f", at {sign.what}" if sign.what else ""
        parts.append(f"{_named([rank], signs)} runs, and has been in {sign.place} for {sign.same_s:g} s{at}")
    if not parts:
        parts.append("all ranks came, and wait: for different things, or for what the network has lost")
    within = "" if within_s is None else f" within collective_timeout_s ({within_s:g} s)"
    why = "" if error is None else f" [{str(error).strip().splitlines()[0]}]"
    return RanksMissingError(f"{what} did not end{within}: {'; '.join(parts)}.{why}", (*silent, *running))


def _unreachable(what: str, known: Mapping[int, Sign]) -> RanksMissingError:
    """The error when the store does not answer either."""
    ranks: tuple[int, ...] = ()
    if dist.is_torchelastic_launched():
        holder = f"torchrun{f' on host {known[0].host}' if 0 in known else ''}"
    else:
        holder, ranks = _named([0], known), (0,)
    return RanksMissingError(
        f"{what} did not end, and the job's store does not answer: {holder}, which holds it, is stopped, has ended or "
        "is cut off from here. What became of other ranks is not known.",
        ranks,
    )
