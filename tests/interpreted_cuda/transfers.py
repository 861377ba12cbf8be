"""What goes between host and device, counted: copies to the device, and times that the host waits for it.

with on_cuda(), counted() as transfers: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from interpreted_cuda import tensors
from interpreted_cuda.tensors import CUDA, CudaTensor, host_of, made_on_cuda

# Whose result has a size that only the device knows, or which read a number of it.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "_unique2", "bincount")


@dataclass
class Transfers:
    """So far: copies to the device and their bytes, and how often the host has read what the device had."""

    num_copies: int = 0
    num_bytes: int = 0
    num_waits: int = 0

    def __sub__(self, before: Transfers) -> Transfers:
        return Transfers(*(getattr(self, name) - getattr(before, name) for name in vars(self)))

    def note(self, source: Any, device: Any) -> None:
        """Something goes from `source` to `device`."""
        to_cuda, is_on_cuda = torch.device(device).type == "cuda", isinstance(source, CudaTensor)
        if to_cuda and not is_on_cuda and isinstance(source, Tensor) and source.dim():
            self.num_copies += 1
            self.num_bytes += source.nbytes
        elif is_on_cuda and not to_cuda:
            self.num_waits += 1


@contextmanager
def counted() -> Iterator[Transfers]:
    """What is transferred within, of tensors on the pretended device."""
    found = Transfers()
    to_copy, copy = tensors._to_copy, tensors._copy

    def counted_to_copy(func: Any, x: Tensor, *, device: Any = None, **kwargs: Any) -> Tensor:
        found.note(x, device or x.device)
        return to_copy(func, x, device=device, **kwargs)

    def counted_copy(func: Any, to: Tensor, of: Tensor, non_blocking: bool = False) -> Tensor:
        found.note(of, to.device)
        return copy(func, to, of, non_blocking)

    def waiting(func: Any, *args: Any, **kwargs: Any) -> Any:
        found.num_waits += any(isinstance(x, CudaTensor) for x in args)
        out = func(*map(host_of, args), **{name: host_of(x) for name, x in kwargs.items()})
        return CudaTensor(out) if isinstance(out, Tensor) and any(isinstance(x, CudaTensor) for x in args) else out

    def counted_list(x: Tensor) -> Any:
        found.num_waits += 1
        return host_of(x).tolist()

    def counted_item(x: Tensor, index: Any) -> Tensor:
        """A list of rows is a copy to the device, a mask of them is read."""
        for part in index if isinstance(index, tuple) else (index,):
            found.num_copies += isinstance(part, list)
            found.num_waits += isinstance(part, Tensor) and part.dtype == torch.bool
        return tensors._get_item(x, index)

    def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        on_cuda = made_on_cuda(make)

        def counted_make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if device is not None and torch.device(device).type == "cuda":
                found.num_copies += 1
            return on_cuda(*args, device=device, **kwargs)

        return counted_make

    special = {"aten::_to_copy": counted_to_copy, "aten::copy_": counted_copy}
    special |= {f"aten::{name}": waiting for name in _WAITING}
    above = {
        Tensor.tolist: counted_list,
        Tensor.copy_: lambda to, of, non_blocking=False: counted_copy(None, to, of),
        Tensor.__getitem__: counted_item,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(tensors._SPECIAL, special))
        stack.enter_context(mock.patch.dict(tensors.ABOVE_THE_DISPATCHER, above))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, made(getattr(torch, name))))
        yield found


@contextmanager
def pretended() -> Iterator[None]:
    """As much of torch.cuda as an engine asks for beside tensors, where no kernel of a library runs."""
    answers = {
        "_lazy_init": lambda: None,
        "current_device": lambda: CUDA.index,
        "mem_get_info": lambda device=None: (2**33, 2**33),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
