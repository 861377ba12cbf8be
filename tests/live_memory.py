"""Memory that tensors take, counted exactly: every storage that an operator makes, for as long as anything holds it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Inside the block: `live_bytes` of storages made in it and still held, and the most there were, `peak_bytes`.

    Storages from before do not count, nor do views of them. What libraries allocate past the dispatcher is not seen.
    `used` are the addresses of all storages that operators were given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.used: set[int] = set()
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        storages = [x.untyped_storage() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = set(map(id, storages))
        self.used |= {storage.data_ptr() for storage in storages}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._made(storage)
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)
