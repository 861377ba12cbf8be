"""What `make kernels` runs: FlashInfer's kernels, compiled to PTX and interpreted, in each version that is supported.

    python tests/kernels/run.py                             all of it
    python tests/kernels/run.py --version 0.7.4 -k negative     one version; what is not known here is pytest's

FlashInfer comes without what it depends on, beside a few small packages that it imports; nvcc from CUDA_HOME, from
/usr/local/cuda, or from NVIDIA's packages. All of it, and what is compiled, is kept beside what torch downloads, in
`cpinfer_tests`: the first time takes some minutes for each version. Where a package or a compiler cannot be
had, that is said, and nothing is run: the exit code is 0 then, as of tests that are skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent
sys.path.insert(0, str(TESTS))

from interpreted_cuda.build import cache_folder, compiler, interpreter_folder  # noqa: E402

VERSIONS = ("0.6.18", "0.7.4")
# What FlashInfer imports beside torch, numpy and what this environment has anyway.
IMPORTED = ("apache-tvm-ffi", "ninja", "nvidia-ml-py", "einops", "tabulate", "requests", "click", "charset_normalizer")
NVCC = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime", "nvidia-nvvm")
CUDA_MAJOR = 13
TOOLKITS = ("/usr/local/cuda", f"/usr/local/cuda-{CUDA_MAJOR}.0")


class MissingError(Exception):
    """What the tests cannot be run without, and how to get it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=VERSIONS, action="append", help="of FlashInfer; may be repeated")
    args, for_pytest = parser.parse_known_args(arguments)
    try:
        if compiler() is None:
            raise MissingError("there is no C++ compiler: install g++")
        prepared = [environment_of(version) for version in args.version or VERSIONS]
    except MissingError as missing:
        print(f"make kernels: skipped, {missing}", file=sys.stderr)
        return 0
    command = [sys.executable, "-m", "pytest", "-q", *(for_pytest or ["--durations=5"])]
    command += [] if any(x.startswith("tests/") for x in for_pytest) else [str(HERE)]
    codes = [subprocess.run(command, env=environment, cwd=TESTS.parent).returncode for environment in prepared]
    return max(codes)


def environment_of(version: str) -> dict[str, str]:
    """That of a process in which this version is found, and compiles its kernels to PTX. MissingError."""
    kept = cache_folder() / "flashinfer"
    library = installed(kept / version, f"flashinfer-python=={version}")
    beside = installed(kept / "imported", *IMPORTED)
    toolkit = cuda_home(kept)
    nvcc = kept / "nvcc_for_ptx"  # where it stays: another path would compile everything again
    shutil.copy(TESTS / "interpreted_cuda" / "nvcc_for_ptx", nvcc)
    interpreter = interpreter_folder()
    stub = kept / "stubs"  # a place that does not change with the interpreter, which compiled modules name
    stub.mkdir(exist_ok=True)
    for name in ("libcudart.so", "libcuda.so"):
        (stub / f"{name}.new").unlink(missing_ok=True)
        (stub / f"{name}.new").symlink_to(interpreter / name)
        os.replace(stub / f"{name}.new", stub / name)
    paths = [str(library), str(beside), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(beside / "bin"), os.environ["PATH"]]),
        "CUDA_HOME": str(toolkit),
        "FLASHINFER_NVCC": str(nvcc),
        "FLASHINFER_CUDA_ARCH_LIST": "8.0",
        "FLASHINFER_WORKSPACE_BASE": str(kept / f"{version}-modules"),
        # What was left out of a module is missed when it is called, not when the module is loaded.
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{stub} -Wl,-z,lazy",
        "FLASHINFER_LOGGING_LEVEL": os.environ.get("FLASHINFER_LOGGING_LEVEL", "warning"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def installed(folder: Path, *packages: str) -> Path:
    """The folder with these packages, and without what they depend on. MissingError where they cannot be had."""
    done = folder / ".installed"
    if done.exists() and done.read_text(encoding="utf-8") == " ".join(packages):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    got = subprocess.run(command, capture_output=True, text=True)
    if got.returncode:
        last = got.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise MissingError(f"{' '.join(packages)} could not be installed: {last[0]}")
    done.write_text(" ".join(packages), encoding="utf-8")
    return folder


def cuda_home(kept: Path) -> Path:
    """A toolkit with nvcc of CUDA 13, or one put together from NVIDIA's packages. MissingError."""
    for found in filter(None, [os.environ.get("CUDA_HOME"), *TOOLKITS]):
        nvcc = Path(found) / "bin" / "nvcc"
        if nvcc.exists() and f"release {CUDA_MAJOR}." in output_of(str(nvcc), "--version"):
            return Path(found)
    toolkit = installed(kept / "toolkit", *(f"{package}=={CUDA_MAJOR}.*" for package in NVCC))
    home = toolkit / "nvidia" / f"cu{CUDA_MAJOR}"
    if not (home / "bin" / "nvcc").exists():
        raise MissingError(f"no nvcc in {home}: set CUDA_HOME to a toolkit of CUDA {CUDA_MAJOR}")
    (home / "bin" / "nvcc").chmod(0o755)
    if not (home / "lib64").exists():
        (home / "lib64").symlink_to("lib")
    return home


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
