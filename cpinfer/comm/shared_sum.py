"""Sums over the ranks of one host on CPU, in memory that they share, in the place of a group's all-reduce.

gloo sends partial sums through sockets, which takes longer than the products they are of where steps are small. Here
each rank writes its terms into a segment of at most `MAX_BYTES`, chunk by chunk, and all of them read the terms of all
(`cpu_kernels/shared_sum.cpp`). Terms are added in the order of ranks, in float32, and rounded once: every rank has the
same bits, and of two ranks they are gloo's.

The segment has no name: the first rank makes it, the others open it through /proc, and it is gone with the last of
them, however they end. Each rank locks a byte of it; the lock goes with the process, which is how others see that it
has ended. Whoever waits looks so every `_LOOK_S`, and waits as long as the group's own collectives do.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpinfer.comm.axis import AxisComm
from cpinfer.errors import PeerLostError, RanksDifferError, UserError
from cpinfer.ops.cpu_kernels.compiling import compiled

DTYPES: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
MAX_BYTES = 2**20
# Beside it a place for each rank, of 128 bytes, and what the segment is known by.
_HEAD_BYTES, _PLACE_BYTES, _TOKEN_BYTES = 4096, 128, 16
MAX_RANKS = (_HEAD_BYTES - _TOKEN_BYTES) // _PLACE_BYTES
# How long a rank that waits keeps looking before it sleeps: products of equal size end about so far apart.
_SPIN_S = 100e-6
_LOOK_S = 0.1
_MESSAGE_BYTES = 1024
_DONE, _WAITS, _DIFFERS = range(3)


class _Call(ctypes.Structure):
    """`Call` of the C++ file, field by field."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("size", "index", "slots_at", "chunk_bytes", "spin_ns", "wait_ns")),
        ("x", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("count", "dtype", "other", "other_count", "other_dtype", "done", "crowded")
        ),
        ("stage", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    ]


class SharedSum:
    """One rank's part in the sums of `ranks`, of the world, over a segment that all of them have mapped.

    Made by `open_shared_sum`. Every rank makes the same calls in the same order. Behind an error it is of no more use.

    Args:
        fd: of the segment; it is closed with this.
        ranks: those that sum.
        index: this rank's place among them.
        limit_s: how long to wait for others, asked while waiting.
    """

    def __init__(self, fd: int, ranks: Sequence[int], index: int, limit_s: Callable[[], float]) -> None:
        self._fd, self._ranks, self._limit_s = fd, tuple(ranks), limit_s
        self._is_closed = False
        # Holds the mapping, which ends with it.
        self._memory = ctypes.c_char.from_buffer(mmap.mmap(fd, segment_bytes(len(ranks))))
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        self._library = compiled("shared_sum")
        self._run = self._library.cpinfer_shared_sum
        self._run.restype = self._library.cpinfer_has_left_shared_sum.restype = ctypes.c_int64
        self._call = _Call(
            memory=ctypes.addressof(self._memory),
            size=len(ranks),
            index=index,
            slots_at=_HEAD_BYTES,
            chunk_bytes=_chunk_bytes(len(ranks)),
            spin_ns=int(_SPIN_S * 1e9),
            wait_ns=int(_LOOK_S * 1e9),
        )
        self._at_call = ctypes.byref(self._call)

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is on CPU and of a dtype that is summed here."""
        return x.device.type == "cpu" and x.dtype in DTYPES

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x`, of any shape and strides, which holds the sum over all ranks then; of an empty one nothing.

        PeerLostError when another rank has ended or left, RanksDifferError, on all, when ranks bring other sizes or
        dtypes, RuntimeError when one does not come in time.
        """
        if self._is_closed:
            raise PeerLostError(
                "an earlier sum over tensor-parallel ranks has failed on this rank, or its engine has ended. Leave the "
                "`with cpinfer.attach(...)` block, and attach again."
            )
        dense, call = x.detach().contiguous(), self._call
        call.x, call.count, call.dtype, call.done = dense.data_ptr(), dense.numel(), DTYPES[dense.dtype], 0
        try:
            status = self._run(self._at_call)
            if status != _DONE:
                self._wait(status)
        except BaseException:  # of a sum that was cut short nobody knows how far others came
            self.close()
            raise
        if dense.data_ptr() != x.data_ptr():
            x.detach().copy_(dense)
        return x

    def close(self) -> None:
        """Leave: who waits for this rank has an error, and the memory is free when all have left."""
        if not self._is_closed:
            self._is_closed = True
            self._library.cpinfer_leave_shared_sum(self._at_call)
            del self._memory
            os.close(self._fd)

    def _wait(self, status: int) -> None:
        began_s = time.monotonic()
        while status == _WAITS:
            gone = self._gone()  # before another look: who has left may have come before
            waited_s, limit_s = time.monotonic() - began_s, self._limit_s()
            status = self._run(self._at_call)
            if status != _WAITS:
                continue
            other = self._ranks[self._call.other]
            if gone is not None:
                raise PeerLostError(f"rank {gone} has ended, or left its engine, while others waited for it in a sum")
            if waited_s > limit_s:
                raise RuntimeError(f"timed out waiting {limit_s:g} s for rank {other}, in a sum in shared memory")
        if status == _DIFFERS:
            call, names = self._call, {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}
            raise RanksDifferError(
                f"rank {self._ranks[call.index]} sums {call.count} numbers of {names[call.dtype]}, "
                f"rank {self._ranks[call.other]} {call.other_count} of {names[call.other_dtype]}; tensor-parallel "
                "ranks sum the same. Run the same step of the same model on all of them."
            )

    def _gone(self) -> int | None:
        """A rank that sums no more."""
        for place, rank in enumerate(self._ranks):
            if place == self._call.index:
                continue
            if self._library.cpinfer_has_left_shared_sum(self._at_call, ctypes.c_int64(place)):
                return rank
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:  # it holds it, and lives
                continue
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, place)  # others look, too
            return rank
        return None


class SharedSumGroup:
    """Stands in for a process group that layers hold: it sums in shared memory, and leaves all else to the group."""

    def __init__(self, group: dist.ProcessGroup, shared: SharedSum) -> None:
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
        if not (is_sum and len(tensors) == 1 and self._shared.takes(tensors[0])):
            return self._group.allreduce(tensors, options)
        self._shared.all_reduce(tensors[0])
        return None


class SharedSumComm:
    """Stands in for the communicator of an axis likewise."""

    def __init__(self, inner: AxisComm, shared: SharedSum) -> None:
        self._inner, self._shared = inner, shared

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def index(self) -> int:
        return self._inner.index

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._inner.all_gather(x, out)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._inner.all_to_all(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._inner.reduce_scatter(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._shared.all_reduce(x) if self._shared.takes(x) else self._inner.all_reduce(x)


def open_shared_sum(
    replica: AxisComm, ranks: Sequence[int], size: int, limit_s: Callable[[], float], why_not: str | None = None
) -> SharedSum | str:
    """Sums of the `size` consecutive ranks that this one belongs to, or why there are none. Collective: two gathers.

    Where one rank cannot, none does, and all are told the same.

    Args:
        replica: the axis on which ranks agree.
        ranks: of the world, by their place on that axis.
        size: of each group of consecutive ranks; it divides their number.
        limit_s: how long a sum waits, asked while it waits.
        why_not: why this rank does not want any.
    """
    first = replica.index - replica.index % size
    own, fd = _offer(size, makes=replica.index == first, why_not=why_not)
    told = _gathered(replica, own)
    try:
        why = _refusal(told, ranks, size)
        if why is None:
            shared, why = _opened(told[first], fd, ranks[first : first + size], replica.index - first, limit_s)
            fd = None
            answers = _gathered(replica, {"why": why})
            why = _refusal(answers, ranks, 1)
            if why is None and shared is not None:
                return shared
            if shared is not None:
                shared.close()
    finally:
        if fd is not None:
            os.close(fd)
    return str(why)


def segment_bytes(num_ranks: int) -> int:
    """Of a segment for so many ranks."""
    return _HEAD_BYTES + _num_chunks(num_ranks) * _chunk_bytes(num_ranks)


def _num_chunks(num_ranks: int) -> int:
    return 2 * num_ranks + 2 * (num_ranks > 2)


def _chunk_bytes(num_ranks: int) -> int:
    return (MAX_BYTES - _HEAD_BYTES) // _num_chunks(num_ranks) // 4096 * 4096


def _offer(size: int, *, makes: bool, why_not: str | None) -> tuple[dict[str, Any], int | None]:
    """What this rank tells the others before anything is mapped, and its segment, where it is the one that makes it."""
    offer: dict[str, Any] = {"why": why_not, "host": None}
    fd = None
    try:
        if offer["why"] is None:
            offer["host"] = _host()
            compiled("shared_sum")
            if size > MAX_RANKS:
                offer["why"] = f"{size} ranks are more than {MAX_RANKS}"
            elif makes:
                fd = os.memfd_create("cpinfer sums")
                os.posix_fallocate(fd, 0, segment_bytes(size))  # an error now, where there is no memory for it
                token = secrets.token_bytes(_TOKEN_BYTES)
                os.pwrite(fd, token, _HEAD_BYTES - _TOKEN_BYTES)
                offer |= {"path": f"/proc/{os.getpid()}/fd/{fd}", "token": token.hex()}
    except (UserError, OSError) as error:
        offer["why"] = str(error)
    return offer, fd


def _host() -> list[str]:
    """What processes have in common that find each other under /proc."""
    if sys.platform != "linux":
        raise UserError(f"{sys.platform} shares no memory through /proc")
    return [
        Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
        os.readlink("/proc/self/ns/pid"),
    ]


def _opened(
    offer: Mapping[str, Any], fd: int | None, ranks: Sequence[int], index: int, limit_s: Callable[[], float]
) -> tuple[SharedSum | None, str | None]:
    """This rank's part, of its own segment or the one that is offered; or why not."""
    try:
        if fd is None:
            fd = os.open(offer["path"], os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            if os.pread(fd, _TOKEN_BYTES, _HEAD_BYTES - _TOKEN_BYTES).hex() != offer["token"]:
                raise OSError(f"{offer['path']} is another file here")
        return SharedSum(fd, ranks, index, limit_s), None
    except (OSError, ValueError) as error:
        if fd is not None:
            os.close(fd)
        return None, str(error)


def _refusal(told: Sequence[Mapping[str, Any]], ranks: Sequence[int], size: int) -> str | None:
    """The first reason that a rank has, or that ranks of one group are not on one host."""
    for rank, offer in zip(ranks, told, strict=True):
        if offer["why"] is not None:
            return f"{offer['why']} (rank {rank})"
    for place, offer in enumerate(told):
        first = place - place % size
        if offer.get("host") != told[first].get("host"):
            return f"ranks {ranks[first]} and {ranks[place]} are on different hosts, or in different containers"
    return None


def _gathered(replica: AxisComm, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each rank says, by its place."""
    why = message.get("why")
    text = json.dumps({**message, "why": why and why[:200]}, ensure_ascii=False).encode()
    padded = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in replica.all_gather(padded)]
