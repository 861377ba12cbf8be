"""What is there of memory for a rank, read from what the kernel says, and whether needs fit in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpinfer.comm.bootstrap import Launch
from cpinfer_tools import memory
from cpinfer_tools.memory import AvailableMemory, Fit, MemoryNeeds, available_memory, host_available_bytes

MEMINFO = "MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:   4000 kB\nHugePages_Total: 0\n"


@pytest.fixture
def kernel(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "cgroup").mkdir()
    return {"meminfo": tmp_path / "meminfo", "cgroup": tmp_path / "cgroup"}


def limit(kernel: dict[str, Path], most: str, used: int, stat: str) -> None:
    for name, text in (("memory.max", most), ("memory.current", str(used)), ("memory.stat", stat)):
        (kernel["cgroup"] / name).write_text(text)


def test_a_host_without_a_container_has_what_the_kernel_calls_available(kernel: dict[str, Path]) -> None:
    assert host_available_bytes(**kernel) == 4000 * 1024
    limit(kernel, "max\n", 5, "anon 5\n")
    assert host_available_bytes(**kernel) == 4000 * 1024


@pytest.mark.parametrize(
    "most, used, inactive, there",
    [(10**6, 10**5, 0, 900_000), (10**6, 10**6, 40_000, 40_000), (10**6, 2 * 10**6, 0, 0), (10**9, 0, 0, 4000 * 1024)],
)
def test_a_container_has_what_its_limit_leaves(
    kernel: dict[str, Path], most: int, used: int, inactive: int, there: int
) -> None:
    limit(kernel, str(most), used, f"anon 5\ninactive_file {inactive}\n")
    assert host_available_bytes(**kernel) == there


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: many kB\n"])
def test_what_the_kernel_does_not_say_is_unknown(kernel: dict[str, Path], text: str) -> None:
    kernel["meminfo"].write_text(text)
    assert host_available_bytes(**kernel) is None
    kernel["meminfo"].unlink()
    assert host_available_bytes(**kernel) is None


@pytest.mark.parametrize(
    "environ, ranks",
    [({}, 8), ({"LOCAL_WORLD_SIZE": "2"}, 2), ({"LOCAL_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": "0"}, 8)],
)
def test_ranks_of_a_host_share_its_memory(monkeypatch: Any, environ: dict[str, str], ranks: int) -> None:
    monkeypatch.setattr(memory, "host_available_bytes", lambda: 8000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert available_memory(Launch(world_size=8), environ) == AvailableMemory(None, 8000 // ranks)


def test_on_a_host_loading_and_keeping_must_both_fit_and_on_a_device_each_in_its_place() -> None:
    needs = MemoryNeeds(weights_bytes=10, kv_pool_bytes=5, loading_bytes=40)
    host = {room: Fit(needs, AvailableMemory(None, room)).fits for room in (14, 39, 40)}
    assert host == {14: False, 39: False, 40: True}
    device = [(14, 40), (15, 39), (15, 40)]
    assert [Fit(needs, AvailableMemory(*room)).fits for room in device] == [False, False, True]
    assert Fit(needs, AvailableMemory(14, None)).fits is False, "one that is known not to fit is enough"
    assert Fit(needs, AvailableMemory(15, None)).fits is None
    with_kernels = MemoryNeeds(weights_bytes=10, kv_pool_bytes=5, loading_bytes=40, kernels_bytes=11)
    assert Fit(with_kernels, AvailableMemory(25, 50)).fits is False
    assert "for kernels" in Fit(with_kernels, AvailableMemory(25, 50)).sentence
    keeps_more = MemoryNeeds(weights_bytes=10, kv_pool_bytes=50, loading_bytes=20)
    assert Fit(keeps_more, AvailableMemory(None, 59)).fits is False
