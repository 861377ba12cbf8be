"""What a run needs of memory against what is there, per rank: for dry runs, which load nothing.

On CUDA the weights and the KV pool lie on the device, and weights pass through the host's memory as they load; on CPU
all of it is the host's, shared by the ranks on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpinfer.comm.bootstrap import Launch

_GIB = 2**30


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes of one rank: of the weights that it keeps, of its KV pool, and of the weights that it loads to cut them.

    `kernels_bytes`: what its attention kernels work in, on the device.
    """

    weights_bytes: int
    kv_pool_bytes: int
    loading_bytes: int
    kernels_bytes: int = 0


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes that one rank can have: of its device, None where it computes on the host; of the host, None if unknown."""

    device_bytes: int | None
    host_bytes: int | None


@dataclass(frozen=True)
class Fit:
    """Needs beside what is there; `fits` is None where that is unknown."""

    needs: MemoryNeeds
    available: AvailableMemory

    @property
    def fits(self) -> bool | None:
        needs, there = self.needs, self.available
        kept = needs.weights_bytes + needs.kv_pool_bytes + needs.kernels_bytes
        pairs = [(max(kept, needs.loading_bytes), there.host_bytes)]
        if there.device_bytes is not None:
            pairs = [(kept, there.device_bytes), (needs.loading_bytes, there.host_bytes)]
        if any(room is not None and wanted > room for wanted, room in pairs):
            return False
        return None if any(room is None for _, room in pairs) else True

    @property
    def summary(self) -> dict[str, Any]:
        """For the last line of a dry run."""
        return {
            "weights_bytes_per_rank": self.needs.weights_bytes,
            "kv_pool_bytes_per_rank": self.needs.kv_pool_bytes,
            "kernels_bytes_per_rank": self.needs.kernels_bytes,
            "loading_bytes_per_rank": self.needs.loading_bytes,
            "device_available_bytes_per_rank": self.available.device_bytes,
            "host_available_bytes_per_rank": self.available.host_bytes,
            "fits_in_memory": self.fits,
        }

    @property
    def sentence(self) -> str:
        """For people."""
        verdict = {True: "fits in memory", False: "DOES NOT FIT IN THIS MACHINE'S MEMORY", None: "may fit in memory"}
        device = "" if self.available.device_bytes is None else f"{_gib(self.available.device_bytes)} of its device, "
        kernels = f" and {_gib(self.needs.kernels_bytes)} for kernels" if self.needs.kernels_bytes else ""
        return (
            f"{verdict[self.fits]}: a rank keeps about {_gib(self.needs.weights_bytes)} of weights and "
            f"{_gib(self.needs.kv_pool_bytes)} of KV pool{kernels}, and loads {_gib(self.needs.loading_bytes)}; free "
            f"for it are {device}{_gib(self.available.host_bytes)} of the host"
        )


def available_memory(launch: Launch, environ: Mapping[str, str]) -> AvailableMemory:
    """What a rank can have now. Ranks on a host are those that its launcher counts there, else all there are."""
    said = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or ""
    num_ranks = int(said) if said.isdigit() and int(said) else launch.world_size
    host = host_available_bytes()
    device = torch.cuda.mem_get_info(launch.device)[0] if launch.device.type == "cuda" else None
    return AvailableMemory(device, None if host is None else host // num_ranks)


def host_available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that new work can have of this host, or of the container around it; None where nobody says (no Linux)."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stats = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Pages of files that nobody writes count as used, and are given up when asked for.
        return min(available, max(0, limit - used + int(stats.get("inactive_file", 0))))
    except (OSError, ValueError):  # "max", or no container
        return available


def _gib(num_bytes: int | None) -> str:
    return "an unknown amount" if num_bytes is None else f"{num_bytes / _GIB:.2f} GiB"
