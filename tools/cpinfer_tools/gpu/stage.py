"""A stage of the GPU check: where it runs, what it found, how things are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds
from cpinfer.attention.backends.registry import make_backend

_HEAD_START_CYCLES = 4_000_000  # about 2 ms


@dataclass(frozen=True)
class Setting:
    """Where a stage runs. `is_smoke`: tiny sizes, to see that the tool works there; what it then says is no figure."""

    device: torch.device
    is_smoke: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend_name(self) -> str:
        return "flashinfer" if self.is_cuda else "torch"

    def backend(self, needs: AttentionNeeds) -> AttentionBackend:
        return make_backend(self.backend_name, self.device, needs)


@dataclass(frozen=True)
class Figure:
    """One thing that was measured, in `unit`. `bound` is the best it could be; `target` must be reached.

    `higher_is_better` says on which side of target and bound it should lie; errors and times are best when low.
    """

    name: str
    value: float
    unit: str
    bound: float | None = None
    target: float | None = None
    higher_is_better: bool = False

    @property
    def ok(self) -> bool | None:
        """Whether the target is reached; None without one. What is not a number reaches none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.higher_is_better else self.value <= self.target

    @property
    def share_of_bound(self) -> float | None:
        if self.bound is None or not self.value:
            return None
        return self.value / self.bound if self.higher_is_better else self.bound / self.value

    def as_json(self) -> dict[str, Any]:
        given = {"bound": self.bound, "share_of_bound": self.share_of_bound, "target": self.target, "ok": self.ok}
        return {"name": self.name, "value": self.value, "unit": self.unit, **given}


@dataclass(frozen=True)
class Found:
    """What a stage found, and what has to be said about it. A stage that could not run has no figures."""

    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool | None:
        """None where nothing had a target."""
        told = [figure.ok for figure in self.figures if figure.ok is not None]
        return all(told) if told else None


def median_s(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `call` after two warm-ups; on CUDA between events, so that the host's part stays out of it."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        if device.type != "cuda":
            start_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_s)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The host gets ahead, as it is between the layers of a model.
        torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def host_s(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds after which `call` returns, whatever the device has still to do, after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def copy_bytes_per_s(setting: Setting) -> float:
    """What a copy on the device moves, bytes read and written."""
    x = torch.rand(2**14 if setting.is_smoke else 2**30, device=setting.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_s(partial(y.copy_, x), setting.device, 5)


def flops_per_s(setting: Setting) -> float:
    """What a large matrix product in the setting's dtype reaches, on random numbers."""
    n = 64 if setting.is_smoke else 8192
    a, b = (torch.randn(n, n, device=setting.device).to(setting.dtype) for _ in range(2))
    return 2 * n**3 / median_s(partial(torch.mm, a, b), setting.device, 5)
