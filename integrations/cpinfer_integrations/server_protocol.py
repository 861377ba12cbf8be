"""uvicorn's HTTP with limits that it lacks: who keeps the server waiting is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class ImpatientProtocol(H11Protocol):
    """Drops clients whose headers take too long, who do not take an answer, or who are still there at the end.

    Bodies, and pauses between requests, have other limits.
    """

    def __init__(self, *args: Any, max_headers_s: float, max_unread_s: float, flush_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_headers_s, self._max_unread_s, self._flush_s = max_headers_s, max_unread_s, flush_s
        self._headers, self._unread, self._end = _Timer(self.loop), _Timer(self.loop), _Timer(self.loop)

    @classmethod
    def within(cls, *, max_headers_s: float, max_unread_s: float, flush_s: float) -> Any:
        """What makes protocols of this patience.

        Args:
            max_headers_s: seconds for the headers of each request.
            max_unread_s: for taking what has been sent.
            flush_s: for both, once the server ends.
        """
        return partial(cls, max_headers_s=max_headers_s, max_unread_s=max_unread_s, flush_s=flush_s)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # for `pause_writing` to tell of all that is not taken, however little
        self._headers.start(self._max_headers_s, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # a request has begun
            self._headers.stop()
        elif not self._headers.runs:
            self._headers.start(self._max_headers_s, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.start(self._max_unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.stop()

    def shutdown(self) -> None:
        super().shutdown()
        self._end.start(self._flush_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers, self._unread, self._end):
            timer.stop()
        super().connection_lost(exc)


class _Timer:
    """Something that is done later unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, act: Callable[[], Any]) -> None:
        self._handle = self._loop.call_later(seconds, act)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
