"""What FlashInfer compiles its kernels with when they are first used: looked for before, named where it is missing.

    CUDA_HOME/bin/nvcc                    compiles kernels       c++          compiles what calls them
    CUDA_HOME/include/cuda_runtime.h                             libcuda.so   is linked, the driver's or a stub of it
    CUDA_HOME/lib64/libcudart.so          is linked by this name, which NVIDIA's packages for pip do not have
    CUDA_HOME/include/curand_kernel.h     FlashAttention-3's prefill kernels alone include it

CUDA_HOME is what FlashInfer takes for it. Variables of its own may name other tools, so what is not found here may be
there all the same: it is warned of, and repeated where something then fails. Kernels that came compiled want nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# The package of kernels that are compiled already.
_COMPILED_KERNELS = "flashinfer_jit_cache"


def cuda_home() -> Path | None:
    """Where FlashInfer looks for CUDA's toolkit; None where there is none, or no FlashInfer."""
    try:
        return Path(import_module("flashinfer.jit.cpp_ext").get_cuda_path())
    except (ImportError, RuntimeError):
        return None


def missing_tools(home: Path | None) -> tuple[str, ...]:
    """What kernels cannot be compiled without and was not found, each with what brings it."""
    return () if find_spec(_COMPILED_KERNELS) is not None else tuple(_missing(home))


def missing_for_fa3(home: Path | None) -> str | None:
    """What FlashAttention-3's prefill kernels cannot be compiled without and was not found; None when they can be."""
    if find_spec(_COMPILED_KERNELS) is not None or (home is not None and (home / "include/curand_kernel.h").exists()):
        return None
    return f"curand_kernel.h in {_folder(home, 'include')} (cuRAND's headers; pip: nvidia-curand, apt: libcurand-dev-*)"


def _missing(home: Path | None) -> Iterator[str]:
    if home is None or not (home / "bin/nvcc").exists():
        yield (
            f"nvcc in {_folder(home, 'bin')} (CUDA's toolkit, named in CUDA_HOME; pip: nvidia-cuda-nvcc, "
            "nvidia-cuda-crt, nvidia-cuda-cccl, nvidia-cuda-runtime, nvidia-nvvm)"
        )
    elif not (home / "include/cuda_runtime.h").exists():
        yield f"cuda_runtime.h in {home / 'include'} (pip: nvidia-cuda-runtime, apt: cuda-cudart-dev-*)"
    compiler = shutil.which("c++")
    if compiler is None:
        yield "c++, a C++ compiler (apt: g++)"
        return
    if not _links("libcudart.so", compiler, home):
        yield (
            f"libcudart.so to link with in {_folder(home, 'lib64')} (of the toolkit; of pip's nvidia-cuda-runtime a "
            "link to its lib/libcudart.so.13; apt: cuda-cudart-dev-*)"
        )
    if not _links("libcuda.so", compiler, home):
        yield (
            "libcuda.so to link with (the driver's, with its link for developers, or the stub of CUDA's toolkit in "
            f"{_folder(home, 'lib64/stubs')}; apt: cuda-driver-dev-*)"
        )


def _links(name: str, compiler: str, home: Path | None) -> bool:
    if home is not None and any((home / folder / name).exists() for folder in ("lib64/stubs", "lib64")):
        return True
    # A path where the compiler finds it by itself, else the name as it was given.
    asked = [compiler, f"-print-file-name={name}"]
    return "/" in subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout


def _folder(home: Path | None, name: str) -> str:
    return f"CUDA_HOME/{name}" if home is None else str(home / name)
