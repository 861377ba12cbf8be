"""Compile FlashInfer's kernels for a model before a job asks for them: no GPU is needed, CUDA's toolkit is.

    cpinfer build-kernels --config configs/qwen2.5-3b_pcp2_dcp4.json --arch 9.0a
    cpinfer build-kernels --model Qwen/Qwen3-8B --arch 8.0
    cpinfer build-kernels --model Qwen/Qwen3-8B --arch 9.0a --list        # what would be compiled

A job compiles what it lacks when it starts, which takes minutes for each module, while its other ranks wait. Run this
once where the job's cache folder is seen (FLASHINFER_WORKSPACE_BASE, else the home folder), by the same FlashInfer,
with the same CUDA_HOME and compilers: with others, all of it is compiled again. MAX_JOBS bounds the compilers at once.
Several of these commands, and jobs, may run at once: one compiles, the others wait.

--arch is the GPU's compute capability (8.0, 9.0a, 10.0a); without it, this machine's. Of a config count its model,
layout, dtype and kv_cache_dtype; --model alone is one process in bfloat16. What no kernel exists for is refused here.
The last line of stdout is one JSON object. Exit codes: 0 all is there, 1 something does not compile, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.flashinfer.building import build_modules
from cpinfer.attention.backends.flashinfer.kernels import Chip, KernelModule, kernel_modules, refused
from cpinfer.attention.backends.flashinfer.toolchain import cuda_home, missing_for_fa3, missing_tools
from cpinfer.config import LaunchConfig, load_as, parse_as
from cpinfer.engine.needs import attention_needs
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_spec

EXIT_DONE, EXIT_FAILURE, EXIT_BAD_INPUT = 0, 1, 2


class Arch(NamedTuple):
    """What is compiled for: as FlashInfer writes it, and as a compute capability."""

    name: str
    capability: tuple[int, int]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = _parser(prog).parse_args(argv)
    try:
        arch = _arch(args.arch)
        needs = list(_needs(args))
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch.name  # read when FlashInfer is imported
        modules = _modules(needs, arch, is_list=args.list)
    except UserError as error:
        _say(str(error))
        return EXIT_BAD_INPUT
    if args.list:
        print("\n".join(map(str, modules)))
        return EXIT_DONE
    start_s = time.perf_counter()
    done: list[dict[str, Any]] = []
    try:
        for built in build_modules(modules, _say):
            how = f"compiled in {built.seconds:.0f} s" if built.seconds else "there"
            _say(f"{len(done) + 1} of {len(modules)}: {built.module}: {how}, {built.num_bytes / 2**20:.1f} MiB")
            done.append({"module": str(built.module), "seconds": built.seconds, "bytes": built.num_bytes})
    except (UserError, OSError) as error:  # no room, no right to write, or a file system without locks
        _say(str(error))
        return EXIT_FAILURE
    told = {"arch": arch.name, "flashinfer": metadata.version("flashinfer-python"), "modules": done}
    print(json.dumps({**told, "wall_s": time.perf_counter() - start_s}), flush=True)
    return EXIT_DONE


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE", help="a job's or a run's")
    which.add_argument("--model", help="Hugging Face id, or folder; of it only its config.json is read")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the config; repeatable")
    parser.add_argument("--arch", help="compute capability to compile for, as 9.0a; default: this machine's GPU")
    parser.add_argument("--list", action="store_true", help="say what would be compiled, and compile nothing")
    return parser


def _arch(given: str | None) -> Arch:
    if given is None:
        if not torch.cuda.is_available():
            raise UserError("there is no GPU here, so --arch has to say what to compile for: 8.0, 9.0a, 10.0a, ...")
        major, minor = torch.cuda.get_device_capability()
        return Arch(f"{major}.{minor}", (major, minor))
    parts = re.fullmatch(r"(\d+)\.(\d+)[af]?", given)
    if parts is None:
        raise UserError(f"--arch {given}: a compute capability was wanted, as 8.0, 9.0a or 10.0a")
    return Arch(given, (int(parts[1]), int(parts[2])))


def _needs(args: argparse.Namespace) -> Iterator[AttentionNeeds]:
    """What each tensor-parallel rank of the job asks of its kernels."""
    if args.config is None:
        if args.set:
            raise UserError("--set is for the keys of a --config")
        config = parse_as(LaunchConfig, {"model": args.model})
    else:
        config = load_as(LaunchConfig, args.config, args.set)
    if config.model is None:
        raise UserError(f'config {args.config}: "model" is missing; a Hugging Face id or a folder was wanted.')
    spec, grid = load_spec(config.model), RankGrid(config.tp_size, config.pcp_size, config.dcp_size)
    dtypes = (getattr(torch, config.dtype), getattr(torch, config.cache_dtype(config.dtype)))
    for tp_rank in range(grid.tp_size):
        yield attention_needs(spec, spec.heads(grid.tp_size).in_group(grid, tp_rank), *dtypes)


def _modules(needs: Sequence[AttentionNeeds], arch: Arch, *, is_list: bool) -> list[KernelModule]:
    """What the ranks ask for, each once. UserError where no kernel exists for it, or it cannot be compiled here."""
    for each in needs:
        error = refused(each, arch.capability, f"--arch {arch.name}")
        if error is not None:
            raise error
    home = None if find_spec("flashinfer") is None else cuda_home()
    without_fa3 = missing_for_fa3(home) if arch.capability[0] == 9 else None
    if without_fa3 is not None and not is_list:
        _say(f"FlashAttention-3's prefill is left out, and a job will leave it out where it too lacks {without_fa3}")
    if not is_list:
        _check_tools(missing_tools(home))
    chip = Chip(arch.capability, has_fa3_prefill=is_list or without_fa3 is None)
    return list(dict.fromkeys(module for each in needs for module in kernel_modules(each, chip)))


def _check_tools(missing: Sequence[str]) -> None:
    if find_spec("flashinfer") is None:
        raise UserError('FlashInfer is not installed. Run `pip install "cpinfer[flashinfer]"`.')
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        raise UserError("FLASHINFER_DISABLE_JIT is set, which forbids to compile. Unset it.")
    if missing:
        raise UserError(f"to compile its kernels FlashInfer lacks {' and '.join(missing)}")


def _say(message: str) -> None:
    print(f"build_kernels: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
