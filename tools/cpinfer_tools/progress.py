"""Signs of life while a tool runs: tqdm's bar on a terminal, elsewhere (a Slurm log, `| tee`) a line now and then.

    rollout: loading configs/recall-tiny: 0.0018 GB in float32, on 2 rank(s) (cpu)
    rollout: 0.9 of 2.1 GB of weights read after 5 s, 0.18 GB/s
    rollout: loaded in 12.3 s, 2.1 GB of weights read
    rollout: 12/64 samples after 30 s; 3,240 tokens generated, 108/s; 36,279 of prompts computed; about 130 s left

A thread writes the lines, since samples may be long in coming: it reads counts, and nothing reads it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

Clock = Callable[[], float]
# How often the thread looks at the clock.
TICK_S = 0.5


@dataclass(frozen=True)
class Tokens:
    """What was computed so far: tokens that were generated, and tokens of prompts."""

    generated: int
    of_prompts: int


class Schedule:
    """When the next line is due: soon at first, at most every ten seconds, in a long run ever more rarely."""

    FIRST_S, SHORTEST_S, LONGEST_S, SHARE = 3.0, 10.0, 300.0, 0.1

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._due_s = start_s + self.FIRST_S

    def is_due(self, now_s: float) -> bool:
        """Whether a line is due, which is then taken to be written."""
        if now_s < self._due_s:
            return False
        gap_s = max(self.SHORTEST_S, min(self.LONGEST_S, self.SHARE * (now_s - self._start_s)))
        self._due_s = now_s + gap_s
        return True


def progress_line(
    done: int, total: int, unit: str, after_s: float, tokens: Tokens | None = None, most_tokens: int = 0, note: str = ""
) -> str:
    """How far a job is, for people. `most_tokens` is what it generates at most, 0 where nobody knows.

    >>> progress_line(12, 64, "sample", 30.0, Tokens(3240, 36279))
    '12/64 samples after 30 s; 3,240 tokens generated, 108/s; 36,279 of prompts computed; about 130 s left'
    >>> progress_line(0, 64, "sample", 30.0, Tokens(3000, 9), most_tokens=9000)
    '0/64 samples after 30 s; 3,000 tokens generated, 100/s; 9 of prompts computed; 60 s left if all are of full length'
    """
    parts = [f"{done}/{total} {unit}s after {duration(after_s)}"]
    if tokens is not None:
        rate = "" if after_s <= 0 else f", {tokens.generated / after_s:,.0f}/s"
        parts += [f"{tokens.generated:,} tokens generated{rate}", f"{tokens.of_prompts:,} of prompts computed"]
    if note:
        parts.append(note)
    if done:
        parts.append(f"about {duration(after_s * (total - done) / done)} left")
    elif tokens is not None and tokens.generated and most_tokens:
        left_s = after_s * (most_tokens - tokens.generated) / tokens.generated
        parts.append(f"{duration(left_s)} left if all are of full length")
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """A time span in the unit that people would say it in.

    >>> duration(42.4), duration(130), duration(9000)
    ('42 s', '130 s', '2.5 h')
    """
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Counts what is done of `total`, and shows it on `stream` (stderr) inside its block, unless it is not `shown`.

    `tokens` reads what was computed so far, from another thread. `where` stands behind the counts, in lines.
    """

    def __init__(
        self,
        tool: str,
        total: int,
        unit: str,
        *,
        shown: bool,
        tokens: Callable[[], Tokens] | None = None,
        most_tokens: int = 0,
        where: str = "",
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._tool = tool
        self._total = total
        self._unit = unit
        self._shown = shown
        self._tokens = tokens
        self._most_tokens = most_tokens
        self._where = where
        self._stream = stream
        self._clock = clock
        self._done = 0
        self._note = ""
        self._bar: Any = None
        self._lines: Lines | None = None

    def __enter__(self) -> Progress:
        stream = self._stream or sys.stderr
        if not self._shown:
            return self
        if stream.isatty():
            self._bar = tqdm(total=self._total, unit=self._unit, file=stream)
        else:
            self._lines = Lines(self._line, stream, self._clock)
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._lines is not None:
            self._lines.stop()

    def update(self, count: int = 1, **figures: str) -> None:
        """Take note that `count` more are done; `figures` are shown beside them."""
        self._done += count
        self._note = ", ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(**figures)
            self._bar.update(count)

    def _line(self, after_s: float) -> str:
        tokens = None if self._tokens is None else self._tokens()
        line = progress_line(self._done, self._total, self._unit, after_s, tokens, self._most_tokens, self._note)
        return f"{self._tool}: {line}{self._where}"


class Lines:
    """A thread that writes `line(seconds since the start)` to a stream whenever one is due."""

    def __init__(self, line: Callable[[float], str], stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._line = line
        self._stream = stream
        self._clock = clock
        self._start_s = clock()
        self._schedule = Schedule(self._start_s)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_until_ended, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No line comes after this."""
        self._ended.set()
        self._thread.join()

    def write_due(self) -> None:
        """Write a line if one is due."""
        now_s = self._clock()
        if self._schedule.is_due(now_s):
            print(self._line(now_s - self._start_s), file=self._stream, flush=True)

    def _write_until_ended(self) -> None:
        while not self._ended.wait(TICK_S):
            try:
                self.write_due()
            except OSError:  # nobody reads any more; the run itself will notice where it matters
                return


class Loading:
    """Weights as they load, in its block: how long that took, and, to who looks on, how much is read already."""

    def __init__(self, tool: str, clock: Clock) -> None:
        self._tool = tool
        self._clock = clock
        self._read_bytes = self._total_bytes = 0
        self._start_s = clock()
        self._bar: Any = None
        self.load_s: float | None = None  # once its block has ended

    def on_read(self, read_bytes: int, total_bytes: int) -> None:
        """Take note of bytes that were read, and how many will have been in the end; one call at a time."""
        self._read_bytes, self._total_bytes = read_bytes, total_bytes
        if self._bar is not None:
            self._bar.total = total_bytes
            self._bar.update(read_bytes - self._bar.n)

    @contextmanager
    def shown(self, what: str, stream: TextIO) -> Iterator[None]:
        """Say that weights load, now and then how far they are, and in the end how long it took."""
        print(f"{self._tool}: loading {what}", file=stream, flush=True)
        with ExitStack() as stack:
            if stream.isatty():
                self._bar = stack.enter_context(tqdm(unit="B", unit_scale=True, leave=False, file=stream))
            else:
                lines = Lines(self._line, stream, self._clock)
                stack.callback(lines.stop)
                lines.start()
            yield
        read = f", {_gb(self._read_bytes)} GB of weights read" if self._read_bytes else ""
        print(f"{self._tool}: loaded in {self._clock() - self._start_s:.1f} s{read}", file=stream, flush=True)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Set `load_s` where the block ends."""
        yield
        self.load_s = self._clock() - self._start_s

    def _line(self, after_s: float) -> str:
        if not self._read_bytes or after_s <= 0:
            return f"{self._tool}: still loading after {duration(after_s)}"
        told = f"{_gb(self._read_bytes)} of {_gb(self._total_bytes)} GB of weights read after {duration(after_s)}"
        return f"{self._tool}: {told}, {_gb(self._read_bytes / after_s)} GB/s"


@contextmanager
def loading(
    tool: str, what: str, *, shown: bool, stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Iterator[Loading]:
    """A block in which weights load, to people too where it is `shown`."""
    told = Loading(tool, clock)
    with told.timed(), told.shown(what, stream or sys.stderr) if shown else nullcontext():
        yield told


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2g}"
