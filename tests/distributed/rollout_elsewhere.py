"""A tool with its ranks in folders of their own, as on hosts that share no disk, and the first of them late.

torchrun --nproc-per-node 2 tests/distributed/rollout_elsewhere.py FOLDER DELAY_S TOOL --config ...

Each rank runs in FOLDER/rank<i> where that is there; the first takes DELAY_S longer to open the output.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from cpinfer_tools import opening
from cpinfer_tools.cli import run


def main(folder: Path, delay_s: float, tool: str, *arguments: str) -> int:
    rank = os.environ["RANK"]
    own = folder / f"rank{rank}"
    if own.is_dir():
        os.chdir(own)
    if rank == "0":
        opened = opening.open_output

        def open_late(*given: Any) -> None:
            time.sleep(delay_s)
            opened(*given)

        opening.open_output = open_late  # type: ignore[attr-defined]
    return run(tool, arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
