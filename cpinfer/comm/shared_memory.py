"""Collectives of the ranks of one host on CPU, in memory that they share, in the place of a process group's.

gloo sends through sockets what ranks exchange, which takes longer than the products in between where steps are small.
Here each rank writes what it gives into a segment of at most `MAX_BYTES`, chunk by chunk, and takes what is for it from
what all have written (`cpu_kernels/shared_memory.cpp`). Terms of sums are added in the order of ranks, in float32, and
rounded once: every rank has the same bits, and of two ranks they are gloo's.

`comm/segments.py` makes the segment. Each rank locks a byte of it; the lock goes with the process, which is how others
see that it has ended. Whoever waits looks so every `_LOOK_S`, and waits as long as the group's own collectives do.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpinfer.comm.axis import AxisComm
from cpinfer.errors import PeerLostError, RanksDifferError
from cpinfer.ops.cpu_kernels.compiling import compiled, typed

SUMMED_DTYPES: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
MAX_BYTES = 2**20
# Beside it a place for each rank, of 128 bytes, and what the segment is known by.
HEAD_BYTES, _PLACE_BYTES, TOKEN_BYTES = 4096, 128, 16
MAX_RANKS = (HEAD_BYTES - TOKEN_BYTES) // _PLACE_BYTES
# How long a rank that waits keeps looking before it sleeps: products of equal size end about so far apart.
_SPIN_S = 100e-6
_LOOK_S = 0.1
_DONE, _WAITS, _DIFFERS, _BEGINS = range(4)
_ALL_GATHER, _ALL_TO_ALL, _REDUCE_SCATTER, _ALL_REDUCE = range(4)
_DOES = ("gathers", "sends each", "sums for each", "sums")
_BYTES = len(SUMMED_DTYPES)  # of what is copied, whatever it is


class _Call(ctypes.Structure):
    """`Call` of the C++ file, field by field."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("size", "index", "slots_at", "chunk_bytes", "spin_ns", "wait_ns")),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "count", "dtype")),
        *((name, ctypes.c_int64) for name in ("other", "other_kind", "other_count", "other_dtype")),
        *((name, ctypes.c_int64) for name in ("status", "done", "crowded")),
        ("stage", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    ]


class _Held:
    """A segment's file and mapping, which end with the last who refers to it: a collective in another thread may."""

    def __init__(self, fd: int, memory: object) -> None:
        self.fd, self.pid, self._memory = fd, os.getpid(), memory

    def __del__(self) -> None:
        os.close(self.fd)


class SharedMemory:
    """One rank's part in the collectives of `ranks`, of the world, over a segment that all of them have mapped.

    Its collectives are those of `AxisComm`, places in the order of `ranks`, of tensors that it `takes`. They raise
    PeerLostError when another rank has ended or left, RanksDifferError, on all, when ranks make other calls, and
    RuntimeError when one does not come in time. Behind an error it is of no more use. A first KeyboardInterrupt waits
    until the collective is done, as in a process group's: others count on this rank's part of it. A collective of one
    thread, in which another thread calls `close`, raises PeerLostError.

    Args:
        fd: of the segment; it is closed with this.
        ranks: those that exchange.
        index: this rank's place among them.
        limit_s: how long to wait for others, asked while waiting.
    """

    def __init__(self, fd: int, ranks: Sequence[int], index: int, limit_s: Callable[[], float]) -> None:
        self._ranks, self._limit_s = tuple(ranks), limit_s
        # Holds the mapping, which ends with it.
        memory = ctypes.c_char.from_buffer(mmap.mmap(fd, segment_bytes(len(ranks))))
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        self._library = typed(
            compiled("shared_memory"),
            cpinfer_run_collective="p",
            cpinfer_leave_collectives="p",
            cpinfer_has_left_collectives="pn",
        )
        self._call = _Call(
            memory=ctypes.addressof(memory),
            size=len(ranks),
            index=index,
            slots_at=HEAD_BYTES,
            chunk_bytes=chunk_bytes(len(ranks)),
            spin_ns=int(_SPIN_S * 1e9),
            wait_ns=int(_LOOK_S * 1e9),
        )
        self._at_call = ctypes.byref(self._call)
        self._held: _Held | None = _Held(fd, memory)

    @property
    def size(self) -> int:
        return len(self._ranks)

    @property
    def index(self) -> int:
        return int(self._call.index)

    def takes(self, x: Tensor, *, in_sum: bool = False) -> bool:
        """Whether `x` is on CPU and, of sums, of a dtype that is summed here."""
        return x.device.type == "cpu" and (not in_sum or x.dtype in SUMMED_DTYPES)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        x = x.detach().contiguous()
        if out is None:
            out = x.new_empty(self.size, *x.shape)
        elif out.nbytes != self.size * x.nbytes:
            raise ValueError(f"{[*out.shape]} of {out.dtype} do not hold {self.size} times {[*x.shape]} of {x.dtype}")
        self._exchange(_ALL_GATHER, x, out.view(-1), x.nbytes, _BYTES)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        out = torch.empty_like(x)
        self._exchange(_ALL_TO_ALL, x, out, x.nbytes // self.size, _BYTES)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        out = torch.empty_like(x[0])
        self._exchange(_REDUCE_SCATTER, x, out, out.numel(), SUMMED_DTYPES[x.dtype])
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x`, of any shape and strides, which holds the sum then."""
        dense = x.detach().contiguous()
        self._exchange(_ALL_REDUCE, dense, dense, dense.numel(), SUMMED_DTYPES[dense.dtype])
        if dense.data_ptr() != x.data_ptr():
            x.detach().copy_(dense)
        return x

    def close(self) -> None:
        """Leave: who waits for this rank has an error, and the memory is free when all have left.

        A process that was forked from this rank leaves nothing: it has a mapping of its own, and the rank goes on.
        """
        held, self._held = self._held, None
        if held is not None and held.pid == os.getpid():
            self._library.cpinfer_leave_collectives(self._at_call)

    def _exchange(self, kind: int, x: Tensor, out: Tensor, count: int, dtype: int) -> None:
        """A collective of messages of `count` elements, or bytes; of none, too, ranks wait for each other."""
        held, interrupt = self._held, None
        if held is None:
            raise PeerLostError(
                "an earlier exchange in shared memory has failed on this rank, or its engine has ended. Leave the "
                "`with cpinfer.attach(...)` block, and attach again."
            )
        call, began_s = self._call, time.monotonic()
        call.x, call.out = x.data_ptr(), out.data_ptr()
        call.kind, call.count, call.dtype = kind, count, dtype
        call.done, call.status = 0, _BEGINS
        try:
            while call.status != _DONE:
                try:
                    self._go_on(held.fd, began_s)
                except KeyboardInterrupt as error:
                    if interrupt is not None:
                        raise
                    interrupt = error
            if interrupt is not None:
                raise interrupt
        finally:  # wherever an error comes: an interrupt may do so between any two lines
            if call.status != _DONE:
                self.close()  # of a collective that was cut short nobody knows how far others came
            del held, interrupt  # who keeps the error, and so this frame, keeps no memory

    def _go_on(self, fd: int, began_s: float) -> None:
        """Run the collective until it is done, or it is time to look at others again."""
        if self._held is None:
            raise PeerLostError("the engine of this rank was left in another thread, while this one exchanged with it")
        gone = self._gone(fd) if self._call.status == _WAITS else None  # before another look: who left may have come
        waited_s, status = time.monotonic() - began_s, self._library.cpinfer_run_collective(self._at_call)
        if status == _DIFFERS:
            call = self._call
            raise RanksDifferError(
                f"rank {self._ranks[call.index]} {_what(call.kind, call.count, call.dtype)}, rank "
                f"{self._ranks[call.other]} {_what(call.other_kind, call.other_count, call.other_dtype)}; ranks of "
                "one group do the same. Run the same step of the same model on all of them."
            )
        if status != _WAITS:
            return
        if gone is not None:
            raise PeerLostError(f"rank {gone} has ended, or left its engine, while others waited for it")
        limit_s = self._limit_s()
        if waited_s > limit_s:
            other = self._ranks[self._call.other]
            raise RuntimeError(f"timed out waiting {limit_s:g} s for rank {other}, in an exchange in shared memory")

    def _gone(self, fd: int) -> int | None:
        """A rank that takes part no more."""
        for place, rank in enumerate(self._ranks):
            if place == self._call.index:
                continue
            if self._library.cpinfer_has_left_collectives(self._at_call, place):
                return rank
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:  # it holds it, and lives
                continue
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, place)  # others look, too
            return rank
        return None


class SharedMemoryGroup:
    """Stands in for a process group that layers hold: it sums in shared memory, and leaves all else to the group."""

    def __init__(self, group: dist.ProcessGroup, shared: SharedMemory) -> None:
        self._group, self._shared = group, shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def __eq__(self, other: object) -> bool:  # torch looks up ranks by the group
        return other is self or other is self._group

    def __hash__(self) -> int:
        return hash(self._group)

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        """What `dist.all_reduce` calls. None, where the sum is there already."""
        is_sum = options.reduceOp == dist.ReduceOp.SUM and not getattr(options, "asyncOp", False)
        if not (is_sum and len(tensors) == 1 and self._shared.takes(tensors[0], in_sum=True)):
            return self._group.allreduce(tensors, options)
        self._shared.all_reduce(tensors[0])
        return None


class SharedMemoryComm:
    """Stands in for the communicator of an axis of the same places, and leaves to it what is not taken here."""

    def __init__(self, inner: AxisComm, shared: SharedMemory) -> None:
        self._inner, self._shared = inner, shared
        self.size, self.index = inner.size, inner.index

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._for(x).all_gather(x, out)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._for(x).all_to_all(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._for(x, in_sum=True).reduce_scatter(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._for(x, in_sum=True).all_reduce(x)

    def _for(self, x: Tensor, *, in_sum: bool = False) -> AxisComm:
        return self._shared if self._shared.takes(x, in_sum=in_sum) else self._inner


def segment_bytes(num_ranks: int) -> int:
    """Of a segment for so many ranks."""
    return HEAD_BYTES + _num_chunks(num_ranks) * chunk_bytes(num_ranks)


def chunk_bytes(num_ranks: int) -> int:
    """What a rank gives at a time, whole pages."""
    return (MAX_BYTES - HEAD_BYTES) // _num_chunks(num_ranks) // 4096 * 4096


def _num_chunks(num_ranks: int) -> int:
    return 2 * num_ranks + 2 * (num_ranks > 2)


def _what(kind: int, count: int, dtype: int) -> str:
    """What a rank does, for people."""
    names = {code: f"numbers of {str(dtype).removeprefix('torch.')}" for dtype, code in SUMMED_DTYPES.items()}
    return f"{_DOES[kind]} {count} {names.get(dtype, 'bytes')}"
