"""Segments of memory that ranks of one host share, for the collectives of `comm/shared_memory.py`.

A segment has no name: the first rank of a group makes it, the others open it through /proc, and it is gone with the
last of them, however they end. Where one rank cannot, no rank of the axis does, and all are told the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpinfer.comm.axis import AxisComm
from cpinfer.comm.shared_memory import HEAD_BYTES, MAX_RANKS, TOKEN_BYTES, SharedMemory, segment_bytes
from cpinfer.errors import UserError
from cpinfer.layout.grid import Group
from cpinfer.ops.cpu_kernels.compiling import compiled

_TOKEN_AT = HEAD_BYTES - TOKEN_BYTES
_CLOSE_ON_EXEC = 1  # MFD_CLOEXEC
# Of a message in which a rank speaks of all axes, and of a reason in it.
_MESSAGE_BYTES, _REASON_CHARACTERS = 8192, 200


@dataclass(frozen=True)
class SharingAxis:
    """An axis whose ranks would share memory.

    Attributes:
        groups: all groups of it in a replica, of ranks of the world, in the order of their places along it.
        limit_s: how long its collectives wait for others, asked while they wait.
        why_not: why this rank does not want any.
    """

    groups: Sequence[Group]
    limit_s: Callable[[], float]
    why_not: str | None = None


def open_segments(
    replica: AxisComm, ranks: Sequence[int], axes: Mapping[str, SharingAxis]
) -> dict[str, SharedMemory | str]:
    """By name of the axis: this rank's part in the collectives of its group there, or why there are none.

    The same axes have some on every rank. Collective: at most two gathers.

    Args:
        replica: the axis on which ranks agree.
        ranks: of the world, by their place on that axis.
        axes: the same on every rank, but for what they say of the rank itself.
    """
    segments = {name: _Segment(axis, ranks[replica.index]) for name, axis in axes.items()}
    with ExitStack() as undo:
        for segment in segments.values():
            undo.callback(segment.close)
        offers = _gathered(replica, ranks, {name: segment.offer() for name, segment in segments.items()})
        whys = {name: _refusal(offers[name], axis.groups) for name, axis in axes.items()}
        tried = [name for name, why in whys.items() if why is None]
        if tried:
            answers = _gathered(replica, ranks, {name: {"why": segments[name].open(offers[name])} for name in tried})
            whys |= {name: _refusal(answers[name]) for name in tried}
        return {name: why if why is not None else segments[name].take() for name, why in whys.items()}


class _Segment:
    """A segment while ranks agree on it; what was not taken is gone with `close`."""

    def __init__(self, axis: SharingAxis, rank: int) -> None:
        self._axis, self._rank = axis, rank
        self._ranks = next(group for group in axis.groups if rank in group)
        self._fd: int | None = None
        self._part: SharedMemory | None = None

    def offer(self) -> dict[str, Any]:
        """What this rank tells the others before anything is mapped; the first of a group has made the segment."""
        if self._axis.why_not is not None:
            return {"why": self._axis.why_not}
        offer: dict[str, Any] = {"why": None}
        try:
            offer["host"] = _host()
            compiled("shared_memory")
            size = len(self._ranks)
            if size > MAX_RANKS:
                raise UserError(f"{size} ranks are more than {MAX_RANKS}")
            if self._rank == self._ranks[0]:
                self._fd = _memory_file()
                os.posix_fallocate(self._fd, 0, segment_bytes(size))  # an error now, where there is no memory for it
                token = secrets.token_bytes(TOKEN_BYTES)
                os.pwrite(self._fd, token, _TOKEN_AT)
                offer |= {"path": f"/proc/{os.getpid()}/fd/{self._fd}", "token": token.hex()}
        except (UserError, OSError) as error:
            offer["why"] = str(error)
        return offer

    def open(self, offers: Mapping[int, Mapping[str, Any]]) -> str | None:
        """Map what the first rank of the group offers; why that does not go, where it does not."""
        offer = offers[self._ranks[0]]
        try:
            if self._fd is None:
                self._fd = os.open(offer["path"], os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                if os.pread(self._fd, TOKEN_BYTES, _TOKEN_AT).hex() != offer["token"]:
                    raise OSError(f"{offer['path']} is another file here")
            self._part = SharedMemory(self._fd, self._ranks, self._ranks.index(self._rank), self._axis.limit_s)
            self._fd = None
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def take(self) -> SharedMemory:
        part, self._part = self._part, None
        assert part is not None, "all have opened it"
        return part

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
        if self._fd is not None:
            os.close(self._fd)


def _memory_file() -> int:
    """A file in memory, without a name.

    By libc's own function: `os.memfd_create` is not there where Python was built with a libc older than 2.27, as
    conda's are.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "memfd_create"):
        raise UserError("the C library here has no memfd_create")
    fd = int(libc.memfd_create(b"cpinfer collectives", ctypes.c_uint(_CLOSE_ON_EXEC)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _host() -> list[str]:
    """What processes have in common that find each other under /proc, and whose network is one.

    Where networks differ, as containers have them, a job sees several hosts: one that is cut off is lost to the others.
    """
    if sys.platform != "linux":
        raise UserError(f"{sys.platform} shares no memory through /proc")
    return [
        Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
        *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")),
    ]


def _refusal(told: Mapping[int, Mapping[str, Any]], groups: Sequence[Group] = ()) -> str | None:
    """The first reason that a rank has, or that ranks of one of `groups` are not on one host."""
    for rank, message in told.items():
        if message["why"] is not None:
            return f"{message['why']} (rank {rank})"
    for first, *others in groups:
        for rank in others:
            if told[rank]["host"] != told[first]["host"]:
                return f"ranks {first} and {rank} are on different hosts, or in different containers"
    return None


def _gathered(
    replica: AxisComm, ranks: Sequence[int], messages: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[int, dict[str, Any]]]:
    """What each rank says, by axis and rank."""
    cut = {name: {**said, "why": said["why"] and said["why"][:_REASON_CHARACTERS]} for name, said in messages.items()}
    text = json.dumps(cut, ensure_ascii=False).encode(errors="replace")  # a path may hold what is no text
    padded = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    told = [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in replica.all_gather(padded)]
    return {name: {rank: said[name] for rank, said in zip(ranks, told, strict=True)} for name in messages}
