"""Requests that wait for room, in the order in which they are to get it.

Adding, taking and removing cost by the number of priorities that wait, not by that of requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cpinfer.engine.request import Request


class WaitingQueue:
    """First come first served among requests of one `priority`; of several, the lowest number goes first."""

    def __init__(self) -> None:
        # By priority, then by `id`. No queue is empty.
        self._queues: dict[int, OrderedDict[int, Request]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they are to run."""
        for priority in sorted(self._queues):
            yield from self._queues[priority].values()

    def append(self, request: Request) -> None:
        """Behind all others of its priority."""
        self._queues.setdefault(request.priority, OrderedDict())[id(request)] = request

    def put_back(self, requests: Sequence[Request]) -> None:
        """In front of all others of their priorities, in their order."""
        for request in reversed(requests):
            self.append(request)
            self._queues[request.priority].move_to_end(id(request), last=False)

    def remove(self, request: Request) -> bool:
        """Take a request out; whether it was there."""
        queue = self._queues.get(request.priority)
        if queue is None or queue.pop(id(request), None) is None:
            return False
        if not queue:
            del self._queues[request.priority]
        return True
