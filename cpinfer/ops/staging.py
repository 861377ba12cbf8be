"""Small arrays of the host on their way to a device: those of one step travel together, in one copy.

    with staging.together():            host    [ token ids | positions | slots | ... ]   pinned
        ids = staging.put(token_ids)              |  one copy, at the end of the block
        slots = staging.put(plan.slots)           v
    model(ids)                          device  [ ids       |           | slots | ... ]   what was put are views of it

A view holds what it is to hold once the block has ended. Outside of a block each array is a copy of its own, and on the
CPU nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# In bytes: where arrays begin, so that each can be seen as numbers of its own size; and room for a step at first.
_ALIGNMENT = 16
_FIRST_ROOM = 2**14


class Staging:
    """The way of one rank's small arrays to its device.

    Pinned memory comes from torch's own allocator, which gives none of it out again while a copy may still read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room = _FIRST_ROOM
        self._chunks: list[_Chunk] | None = None

    def put(self, array: NDArray[Any]) -> Tensor:
        """The same numbers on the device, of the same shape."""
        host = np.ascontiguousarray(array)
        if self._device.type == "cpu":
            return torch.from_numpy(host)
        if self._chunks is None:
            with self.together():
                return self.put(host)
        if not self._chunks or not self._chunks[-1].has_room(host.nbytes):
            # As a rule one is enough: the next step has room for as much as this one needed.
            self._room = max(self._room, 2 * host.nbytes)
            self._chunks.append(_Chunk(self._room, self._device))
            self._room *= 1 if len(self._chunks) == 1 else 2
        return self._chunks[-1].put(host)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block: what is put in it is on the device when it has ended."""
        self._chunks = []
        try:
            yield
            for chunk in self._chunks:
                chunk.send()
        finally:
            self._chunks = None


class _Chunk:
    """As much memory on either side, of which the first `used` bytes travel."""

    def __init__(self, room: int, device: torch.device) -> None:
        self._host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
        self._there = torch.empty(room, dtype=torch.uint8, device=device)
        self._used = 0

    def has_room(self, num_bytes: int) -> bool:
        return self._used + num_bytes <= len(self._host)

    def put(self, array: NDArray[Any]) -> Tensor:
        numbers = torch.from_numpy(array)
        here = slice(self._used, self._used + numbers.nbytes)
        self._used += -(-numbers.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._host[here].view(numbers.dtype).view(numbers.shape).copy_(numbers)
        return self._there[here].view(numbers.dtype).view(numbers.shape)

    def send(self) -> None:
        self._there[: self._used].copy_(self._host[: self._used], non_blocking=True)
