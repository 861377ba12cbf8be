"""Modules are compiled by one process at a time, also when one of them is killed; which it is, FlashInfer is asked."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cpinfer.attention.backends.flashinfer import building
from cpinfer.attention.backends.flashinfer.building import build_modules, locked
from cpinfer.attention.backends.flashinfer.kernels import KernelModule
from cpinfer.errors import UserError

pytestmark = pytest.mark.skipif(shutil.which("ninja") is None, reason="there is no ninja")

MODULE = KernelModule("batch_prefill", "fa2", torch.bfloat16, torch.bfloat16, 128, 128)
WITHIN_S = 60.0
FORK = multiprocessing.get_context("fork")


@dataclass
class Spec:
    """What FlashInfer says of a module, whose compiler is a line of shell."""

    folder: Path
    compiler: str = "sleep 0.3"
    is_aot: bool = False

    @property
    def lock_path(self) -> Path:
        return self.folder / "module.lock"

    @property
    def build_dir(self) -> Path:
        return self.folder

    @property
    def ninja_path(self) -> Path:
        return self.folder / "build.ninja"

    def get_library_path(self) -> Path:
        return self.folder / "module.so"

    @property
    def num_compiled(self) -> int:
        begun = self.folder / "begun"
        return len(begun.read_text().splitlines()) if begun.exists() else 0

    def write_ninja(self) -> None:
        command = f"echo begun >> {self.folder}/begun && {self.compiler} && echo made > $out"
        self.ninja_path.write_text(
            f"rule make\n  command = {command}\nbuild {self.get_library_path()}: make {self.folder}/source\n"
        )


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    (tmp_path / "source").touch()
    made = Spec(tmp_path)
    monkeypatch.setattr(building, "spec_of", lambda module, say: made)
    monkeypatch.setattr(building, "_jobs", list)
    return made


def build(said: list[str], **how: bool) -> building.Built:
    [built] = build_modules([MODULE], said.append, **how)
    return built


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def is_held(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_what_is_there_and_newer_than_its_sources_is_not_compiled_again(spec: Spec) -> None:
    said: list[str] = []
    assert build(said).seconds > 0 and build(said).seconds == 0
    assert said == ["compiles batch_prefill fa2 bfloat16 of 128, which takes minutes"]
    os.utime(spec.folder / "source", ns=(2**62, 2**62))
    assert build(said, only_missing=True).seconds == 0 and spec.num_compiled == 1
    assert build(said).seconds > 0 and spec.num_compiled == 2


def test_what_came_compiled_is_left_alone(spec: Spec) -> None:
    spec.is_aot = True
    assert build([]).seconds == 0 and spec.num_compiled == 0


def test_what_does_not_compile_is_an_error_with_the_compilers_words(spec: Spec) -> None:
    spec.compiler = "echo no such header && false"
    with pytest.raises(UserError, match=r"module batch_prefill fa2 .* could not be compiled:(.|\n)*no such header"):
        build([])
    assert not is_held(spec.lock_path)


def test_of_processes_that_start_together_one_compiles_and_the_others_say_that_they_wait(spec: Spec) -> None:
    queue: Any = FORK.SimpleQueue()

    def rank() -> None:
        said: list[str] = []
        built = build(said)
        queue.put((built.seconds > 0, said))

    ranks = [FORK.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    told = [queue.get() for _ in ranks]
    for process in ranks:
        process.join(WITHIN_S)
    assert spec.num_compiled == 1 and sorted(has_compiled for has_compiled, _ in told) == [False] * 3 + [True]
    waits = ["waits for another process to compile batch_prefill fa2 bfloat16 of 128"]
    assert [said for has_compiled, said in told if not has_compiled] == [waits] * 3


def without_the_lock(fd: int, command: list[str], failed: str) -> bool:
    """As FlashInfer runs ninja: compilers do not inherit what their process holds."""
    subprocess.run(command, capture_output=True, check=True)
    return True


@pytest.mark.parametrize("inherits", [True, False])
def test_compilers_of_a_process_that_was_killed_keep_its_lock_until_they_are_done(
    spec: Spec, monkeypatch: pytest.MonkeyPatch, inherits: bool
) -> None:
    if not inherits:
        monkeypatch.setattr(building, "run_holding", without_the_lock)
    gate = spec.folder / "gate"
    spec.compiler = f"while [ ! -e {gate} ]; do sleep 0.02; done"
    process = FORK.Process(target=build, args=([],))
    process.start()
    until(lambda: spec.num_compiled == 1)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(WITHIN_S)
    was_held = is_held(spec.lock_path)
    gate.touch()
    until(spec.get_library_path().exists)
    # Without, who comes next compiles into the same files at the same time.
    assert was_held == inherits
    if inherits:
        until(lambda: not is_held(spec.lock_path))
        said: list[str] = []
        build(said)
        assert not said, "it is there, and nothing is held by the dead"


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "lock", lambda: None):
        assert is_held(tmp_path / "a" / "lock")
        raise RuntimeError
    assert not is_held(tmp_path / "a" / "lock")
