"""A process that pretends to have a GPU: what torch.cuda says of it, and modules of FlashInfer that find it.

pretend(CARDS["a100"])        once, before FlashInfer is imported
with on_cuda(): ...
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from interpreted_cuda import interpreter
from interpreted_cuda.build import guard_library, interpreter_folder
from interpreted_cuda.modules import LOADED, LOCK, Module
from interpreted_cuda.tensors import CUDA, made_on_cuda


@dataclass(frozen=True)
class Card:
    """A GPU by what plans and launches ask of it; shared memory in bytes."""

    name: str
    major: int
    minor: int
    num_sms: int
    shared_per_sm: int
    shared_per_block: int


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", 8, 0, 108, 167936, 166912),
    "h100": Card("NVIDIA H100 80GB HBM3", 9, 0, 132, 233472, 232448),
}
# With as few multiprocessors plans make few CTAs, and rows of some hundred keys are split.
FEW_SMS = 4


def pretend(card: Card, *, num_sms: int = FEW_SMS, runs: bool = True) -> None:
    """From here on there is this card, with so many multiprocessors. Where it does not run, launches do nothing."""
    folder = interpreter_folder()
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    library = interpreter.library()
    library.interpreter_configure(num_sms, card.major, card.minor, card.shared_per_sm, card.shared_per_block, int(runs))
    is_first = not torch.cuda.is_available()
    _describe(card, num_sms)
    if not is_first:
        return
    ctypes.CDLL(str(guard_library()))
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, made_on_cuda(getattr(torch, name)))
    import tvm_ffi

    load = tvm_ffi.load_module

    def loaded(path: Any, *args: Any, **kwargs: Any) -> Module:
        with LOCK:  # it brings kernels, which a launch looks through
            LOADED.append(str(path))
            return Module(load(path, *args, **kwargs))

    tvm_ffi.load_module = loaded


def _describe(card: Card, num_sms: int) -> None:
    properties = SimpleNamespace(
        name=card.name,
        major=card.major,
        minor=card.minor,
        multi_processor_count=num_sms,
        total_memory=80 << 30,
        shared_memory_per_block_optin=card.shared_per_block,
        shared_memory_per_multiprocessor=card.shared_per_sm,
        max_threads_per_multi_processor=2048,
        warp_size=32,
        L2_cache_size=40 << 20,
        gcnArchName="",
    )
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (card.major, card.minor),
        "get_device_name": lambda device=None: card.name,
        "mem_get_info": lambda device=None: (64 << 30, 80 << 30),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": _Event,
        "Stream": _Stream,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]


class _Event:
    """Everything is done when it is asked for, so nothing is waited for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Stream:
    cuda_stream = 0
    device = CUDA

    def synchronize(self) -> None: ...
    def wait_stream(self, other: _Stream) -> None: ...
    def wait_event(self, event: _Event) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()
