"""Compiles the interpreter (ptx/) and what torch wants beside it, each once for what it is made from."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "ptx"
GUARD = SOURCES / "guard.cpp"
# Nothing may fuse a product and a sum that PTX rounds apart.
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra")
COMPILERS = ("c++", "g++", "clang++")
WITHIN_S = 300.0
# Extensions that are linked with -lcuda find this; what it is asked for, it does not have.
LIBCUDA = 'extern "C" int cuInit(unsigned) { return 0; }\n'


def compiler() -> str | None:
    """The system's C++ compiler; None where there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@cache
def interpreter_folder() -> Path:
    """Where `libcudart.so.13`, the interpreter, and an empty `libcuda.so.1` are, each with its name for linkers."""
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h") and path != GUARD)

    def make(folder: Path) -> None:
        cpp = [path for path in sources if path.suffix == ".cpp"]
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(lambda path: _object(path, folder), cpp))
        # Linked by its own name: modules that want this name are content with the one that is loaded.
        exported = folder / "exported.map"
        exported.write_text("{ global: cuda*; __cuda*; interpreter_*; local: *; };\n", encoding="utf-8")
        _link(objects, folder, "libcudart.so.13", f"-Wl,--version-script={exported}")
        libcuda = folder / "libcuda.cpp"
        libcuda.write_text(LIBCUDA, encoding="utf-8")
        _link([libcuda], folder, "libcuda.so.1")

    return _made_once("interpreter", sources, make)


@cache
def guard_library() -> Path:
    """A device guard for a torch that has none for CUDA, made against the torch that is imported."""

    def make(folder: Path) -> None:
        home = Path(torch.__file__).parent
        flags = ("-std=c++20", "-O1", "-fPIC", "-shared", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10")
        _run(_compiler(), str(GUARD), *flags, "-o", str(folder / "libguard.so"))

    return _made_once("guard", [GUARD], make, torch.__version__) / "libguard.so"


def cache_folder() -> Path:
    """Where things are kept that tests compile: beside what torch keeps of a user's, outside of any checkout."""
    return Path(torch.hub.get_dir()).parent / "cpinfer_tests"


def _made_once(name: str, sources: list[Path], make: Callable[[Path], None], *more: str) -> Path:
    """The folder of what `make` makes of `sources`; others that make it at once find one whole or none."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, timeout=60).stdout
    made_from = [version, platform.processor(), platform.node(), *FLAGS, *more]
    made_from += [path.read_text(encoding="utf-8") for path in [Path(__file__), *sources]]
    found = cache_folder() / f"{name}-{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}"
    if not found.exists():
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent) as folder:
            make(Path(folder))
            try:
                shutil.copytree(folder, f"{folder}.whole", symlinks=True)
                os.rename(f"{folder}.whole", found)
            except OSError:
                shutil.rmtree(f"{folder}.whole", ignore_errors=True)  # another was first
    return found


def _object(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    _run(_compiler(), *FLAGS, "-std=c++17", "-c", str(source), "-o", str(made))
    return made


def _link(parts: list[Path], folder: Path, name: str, *flags: str) -> None:
    _run(_compiler(), "-shared", "-fPIC", f"-Wl,-soname,{name}", *flags, *map(str, parts), "-o", str(folder / name))
    (folder / f"{name.partition('.so')[0]}.so").symlink_to(name)


def _compiler() -> str:
    found = compiler()
    if found is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}), which the interpreter of PTX is built by")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} said\n{done.stderr[-3000:]}")
