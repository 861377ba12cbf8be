"""Logs of the package: loggers under the name "cpinfer", silent until somebody listens, with the rank in every record.

    logging.getLogger("cpinfer").setLevel(logging.INFO)   # beside a handler of the job's own
    with log_to("info", sys.stderr): ...                  # what the tools do

What all ranks of a replica know alike its first rank says at INFO, the others at DEBUG. Nothing here touches the root
logger, and no decision reads a log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

ROOT = "cpinfer"
LEVELS = ("debug", "info", "warning", "error")


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records have `rank`, and name it where there are several. `speaks`: it is the first of those that
    know the same."""

    def __init__(self, name: str, rank: int = 0, world_size: int = 1, *, speaks: bool = True) -> None:
        super().__init__(logging.getLogger(name), {"rank": rank, "world_size": world_size})
        self._prefix = f"rank {rank}: " if world_size > 1 else ""
        self.shared_level = logging.INFO if speaks else logging.DEBUG

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The message with the rank in front, the rank as a field of the record."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return f"{self._prefix}{msg}", kwargs

    def shared(self, msg: str, *args: object) -> None:
        """What others know too: at INFO where this rank speaks for them, else at DEBUG."""
        self.log(self.shared_level, msg, *args)

    def shared_warning(self, msg: str, *args: object) -> None:
        """A warning that others would give too: as such where this rank speaks for them, else at DEBUG."""
        self.log(logging.WARNING if self.shared_level == logging.INFO else logging.DEBUG, msg, *args)


@contextmanager
def log_to(
    level: str, stream: TextIO, rank: int = 0, world_size: int = 1, *, shown: Sequence[str] = ()
) -> Iterator[None]:
    """Records of cpinfer from `level` on, one of `LEVELS`, go to `stream` inside the block; then all is as it was.

    Of the loggers named in `shown` those from INFO on.
    """
    logger = logging.getLogger(ROOT)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(rank, world_size))
    before = {each: each.level for each in (logger, *map(logging.getLogger, shown))}
    for each in before:
        each.setLevel(logging.INFO if each.name in shown else level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for each, was in before.items():
            each.setLevel(was)


class _Formatter(logging.Formatter):
    """Names the rank also in records of those who do not know it."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self._prefix = f"rank {rank}: " if world_size > 1 else ""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if not hasattr(record, "rank"):
            record.message = f"{self._prefix}{record.message}"
        return super().formatMessage(record)
