"""Forks the ranks of a test from a process that has imported what they import: see `launching.forked`.

A rank spends about seven seconds on importing torch, Transformers and DeepSpeed; what a test asks of it takes one. Each
line of stdin is a job, each line of stdout how its ranks ended: their exit codes, in rank order.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

# As launchers do: what is left when a rank has failed is ended.
GRACE_S = 5.0


# cpinfer before torch: it asks which process started this one.
IMPORTED = ("cpinfer", "torch", "transformers.modeling_utils", "deepspeed", "cpinfer_tools.rollout")


def serve() -> None:
    """Until stdin ends, one job after another."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints when it is imported
    gc.disable()  # what modules make is kept
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        job = json.loads(line)
        pids = [_fork(job, rank) for rank in range(job["num_ranks"])]
        print(json.dumps(_wait(pids)), file=answers, flush=True)


def _fork(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        _run(job, rank)
    return pid


def _run(job: dict[str, Any], rank: int) -> NoReturn:
    """Become a rank as torchrun makes one, and end with it."""
    folder, code = Path(job["folder"]), 1
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), fd)
    os.environ.update(job["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [job["script"], *job["arguments"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
