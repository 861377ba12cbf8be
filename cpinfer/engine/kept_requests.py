"""Requests that have ended and whose KV stays where it is, for requests that continue them: sessions between turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from cpinfer.engine.request import SampledRequest


class KeptRequests:
    """Kept requests of every home, longest unused first. A home keeps at most `max_tokens` of them; None: any number.

    `num_blocks`: what they hold in each home, blocks that several of them share counted for each.
    """

    def __init__(self, num_homes: int, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens
        self._homes: list[OrderedDict[int, SampledRequest]] = [OrderedDict() for _ in range(num_homes)]
        self._num_tokens = [0] * num_homes
        self.num_blocks = [0] * num_homes

    def __contains__(self, request: SampledRequest) -> bool:
        return any(id(request) in home for home in self._homes)  # its own may be one of another layout

    def __iter__(self) -> Iterator[SampledRequest]:
        for home in self._homes:
            yield from home.values()

    def add(self, request: SampledRequest) -> None:
        """Keep one, which has been used just now."""
        self._homes[request.home][id(request)] = request
        self._count(request, 1)

    def remove(self, request: SampledRequest) -> None:
        """Keep one no longer; its blocks are still its own."""
        del self._homes[request.home][id(request)]
        self._count(request, -1)

    def num_requests(self, home: int) -> int:
        """How many a home keeps, each of which holds the place of a state where the model has any."""
        return len(self._homes[home])

    def oldest(self, home: int) -> SampledRequest | None:
        """The one that has been unused for longest; None when there is none."""
        return next(iter(self._homes[home].values()), None)

    def are_too_many(self, home: int) -> bool:
        """Whether a home keeps more than it may."""
        return self.max_tokens is not None and self._num_tokens[home] > self.max_tokens

    def _count(self, request: SampledRequest, times: int) -> None:
        self._num_tokens[request.home] += times * request.next_position
        self.num_blocks[request.home] += times * len(request.held_blocks)
