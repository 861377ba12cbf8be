"""Write what ships with cpinfer to a folder: configs, prompts and tiny models that need no download.

    cpinfer init demo
    cd demo
    cpinfer rollout --config configs/single.json

Paths in configs are relative to them, so the folder may be moved. Nothing that exists is replaced without --overwrite.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

EXIT_DONE, EXIT_FAILURE, EXIT_BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="gets a folder configs/; made where there is none")
    parser.add_argument("--overwrite", action="store_true", help="replace files of a configs/ that is there")
    args = parser.parse_args(argv)
    target = args.folder / "configs"
    if target.exists() and not args.overwrite:
        print(f"init: {target} exists. Name another folder, or replace its files with --overwrite.", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        with as_file(files("cpinfer_tools") / "configs") as shipped:
            shutil.copytree(shipped, target, dirs_exist_ok=True)
    except OSError as error:
        print(f"init: {target} could not be written: {error}.", file=sys.stderr)
        return EXIT_FAILURE
    configs = sorted(path.name for path in target.glob("*.json"))
    print(f"{target}: {', '.join(configs)}\nNext: cd {args.folder} && cpinfer rollout --config configs/single.json")
    return EXIT_DONE
