"""Compiles the C++ files of this folder, each into a library of plain functions, and keeps what came of it.

A library is named by what it was made from: source, compiler, flags, processor. So a folder of them may be shared by
machines. Of the ranks of a machine one compiles, and the others wait for what it puts in place.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cpinfer.errors import UserError

# No flag lets the compiler change the order of a sum. It may fuse a product and a sum wherever it meets one.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
COMPILERS = ("c++", "g++", "clang++")
WITHIN_S = 300.0


@cache
def compiled(name: str) -> ctypes.CDLL:
    """The library of `name`.cpp. UserError where it cannot be made, with what the compiler said."""
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = _compiler()
    headers = sorted(source.parent.glob("*.h"))
    texts = [file.read_text(encoding="utf-8") for file in (source, *headers)]
    made_from = "\n".join([*texts, _version(compiler), *FLAGS, _processor()])
    library = _folder() / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():  # an error, too, in a folder that may not be looked into
            library.parent.mkdir(parents=True, exist_ok=True)
            with _alone(library.parent):
                if not library.exists():
                    _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"{source.name} could not be compiled in {library.parent}, or not loaded from there: {error}. "
            "Name a folder that can be written to, and code run from, in TORCH_HOME."
        ) from error


@cache
def functions_of(name: str, **arguments: str) -> Any:
    """The library of `name`.cpp, `typed`; None where it cannot be made, which is asked once."""
    try:
        return typed(compiled(name), **arguments)
    except UserError:
        return None


def typed(library: ctypes.CDLL, **arguments: str) -> ctypes.CDLL:
    """A library whose functions take numbers of Python's: "p" stands for an address, "n" for a number of 64 bits.

    Such a number is what they return, where they return anything.
    """
    for name, kinds in arguments.items():
        function = getattr(library, name)
        function.argtypes = [{"p": ctypes.c_void_p, "n": ctypes.c_int64}[kind] for kind in kinds]
        function.restype = ctypes.c_int64
    return library


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block that one process at a time is in; a lock goes with the process that holds it, however it ends.

    File systems that have no locks let all in: each then puts the same thing in place.
    """
    with (folder / "compiling.lock").open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S)
        if done.returncode:
            raise UserError(
                f"{source.name} could not be compiled: {' '.join(command)} said\n{done.stderr.strip()[-2000:]}"
            )
        os.replace(made, library)  # whole, or not there: others may look for it now


def _compiler() -> str:
    for name in COMPILERS:
        if (found := shutil.which(name)) is not None:
            return found
    raise UserError(
        f"no C++ compiler was found ({', '.join(COMPILERS)}); one was wanted, to compile cpinfer's "
        "kernels for CPU. Install g++ (Debian: `apt install g++`)."
    )


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the compiler {compiler} does not run: {error}. Mend it, or take it out of PATH.") from error


def _processor() -> str:
    """What decides which instructions -march=native makes."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    # In order: that of a set is another in every process, and ranks compare the names of their libraries.
    told_once = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join(told_once) or platform.processor()


def _folder() -> Path:
    """Where libraries are kept: beside what torch keeps of a user's, in TORCH_HOME or the cache of the home."""
    folder = Path(torch.hub.get_dir()).parent / "cpinfer_kernels"
    if not folder.is_absolute():
        raise UserError("the user has no home, where kernels would be kept. Name a folder for them in TORCH_HOME.")
    return folder
