"""uvicorn's HTTP with a limit that it lacks: a connection whose request does not come is closed."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class ImpatientProtocol(H11Protocol):
    """Closes connections whose first headers take too long; bodies, and pauses between requests, have other limits."""

    def __init__(self, *args: Any, max_headers_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_headers_s = max_headers_s
        self._patience: asyncio.TimerHandle | None = None

    @classmethod
    def within(cls, max_headers_s: float) -> Any:
        """What makes protocols of this patience, in seconds."""
        return partial(cls, max_headers_s=max_headers_s)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._patience = self.loop.call_later(self._max_headers_s, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None:  # no request has begun
            self.transport.close()
