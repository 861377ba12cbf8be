"""FlashInfer's modules, compiled before they are asked for: by one process at a time, and safe from those that die.

FlashInfer compiles a module when something is first planned with it, under a lock on a file that the system takes back
when its process dies. The compilers that a killed process has started go on, though, and who gets the lock next starts
others, which write the same files. So modules are compiled here, under the same lock, which the compilers inherit: it
is free once the last of them is gone.

    spec_of(module)     FlashInfer's own description: sources, flags, where the library goes, which file is locked
    ninja               compiles what is not there or older than what it is made from, as when FlashInfer calls it
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpinfer.attention.backends.flashinfer.kernels import KernelModule
from cpinfer.errors import UserError

# Of what a compiler says, the end: that is where the error is.
_MAX_CHARS = 4000


class Built(NamedTuple):
    """A module that is there, after `seconds` of compiling; 0 where it was there. `path`: its library."""

    module: KernelModule
    path: Path
    seconds: float

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


def build_modules(
    modules: Iterable[KernelModule], say: Callable[[str], None], *, only_missing: bool = False
) -> Iterator[Built]:
    """Each module, compiled where it is not up to date; `say` is told what is waited for.

    `only_missing`: what is there is up to date. UserError, with what the compiler said, for one that does not compile.
    """
    for module in modules:
        spec = spec_of(module, say)
        path = Path(spec.get_library_path())
        if spec.is_aot or (only_missing and path.exists()):
            yield Built(module, path, 0.0)
            continue
        with locked(Path(spec.lock_path), partial(say, f"waits for another process to compile {module}")) as fd:
            start_s = time.perf_counter()
            spec.write_ninja()
            if not path.exists():
                say(f"compiles {module}, which takes minutes")
            command = ["ninja", "-C", str(spec.build_dir), "-f", str(spec.ninja_path), *_jobs()]
            has_compiled = run_holding(fd, command, f"FlashInfer's module {module} could not be compiled")
            yield Built(module, path, time.perf_counter() - start_s if has_compiled else 0.0)


def spec_of(module: KernelModule, say: Callable[[str], None]) -> Any:
    """FlashInfer's `JitSpec` of a module, whose sources are written if they are not there."""
    code, core = import_module("flashinfer.jit.attention.modules"), import_module("flashinfer.jit.core")
    made_for = (module.dtype, module.kv_dtype, module.dtype, torch.int32)
    # Sources are written before anybody has the module's lock.
    sources = Path(core.jit_env.FLASHINFER_GEN_SRC_DIR) / "cpinfer.lock"
    with locked(sources, partial(say, "waits for another process to write sources")):
        if module.name == "batch_mla":
            dims = (module.v_dim, module.k_dim - module.v_dim)
            return code.gen_batch_mla_module(module.family, *made_for, *dims, False)
        rest = (module.k_dim, module.v_dim, 0, module.has_window, module.has_cap)  # 0: no encoding of positions
        if module.name == "batch_decode":
            return code.gen_batch_decode_module(*made_for, *rest)
        generate = code.gen_batch_prefill_module
        if module.family == "fa2":  # from 0.7 on plans take the one for keys and values of equal strides
            generate = getattr(code, "_gen_batch_prefill_primary_module", generate)
        return generate(module.family, *made_for, *rest, False)


@contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[int]:
    """A lock on a file, as a descriptor to hand on: held until the block ends and all who have inherited it are gone.

    `wait` is called when another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def run_holding(fd: int, command: list[str], failed: str) -> bool:
    """Run ninja with a lock that it and what it starts keep. Whether there was work. UserError, `failed`, and why."""
    try:
        done = subprocess.run(command, pass_fds=(fd,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{failed}: there is no {command[0]} on the PATH. Install it (pip install ninja).") from error
    if done.returncode:
        raise UserError(f"{failed}:\n{done.stdout[-_MAX_CHARS:]}")
    return "no work to do" not in done.stdout


def _jobs() -> list[str]:
    """How many compilers at once, where FlashInfer has been told by MAX_JOBS."""
    told = getattr(import_module("flashinfer.jit.cpp_ext"), "_get_num_workers", lambda: None)()
    return [] if told is None else ["-j", str(told)]
