"""tools/rollout.py with a fault put into one rank, to see that all ranks end and the right one explains.

torchrun --nproc-per-node 2 tests/distributed/failing_rollout.py {raise|kill|full} --config ...

`full` is a disk that is full after a few lines, of every rank that writes.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import rollout
from cpinfer.engine.step_runner import StepRunner

FAULTY_RANK = 1
STEPS_BEFORE_FAULT = 5
LINES_BEFORE_FAULT = 2


def fill_the_disk() -> None:
    """Let writes of results fail after a few lines; half of the line that fails is written."""
    write = os.write
    lines = iter(range(LINES_BEFORE_FAULT))

    def write_until_full(descriptor: int, data: bytes) -> int:
        if next(lines, None) is None:
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    os.write = write_until_full


def put_fault(fault: str) -> None:
    """Make this rank fail after a few decode steps, if it is the faulty one."""
    if fault == "full":
        fill_the_disk()
        return
    if int(os.environ["RANK"]) == FAULTY_RANK:
        decode = StepRunner._decode
        steps = iter(range(STEPS_BEFORE_FAULT))

        def faulty_decode(runner: StepRunner, *given: Any) -> Any:
            if next(steps, None) is None:
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the fault that was put in")
            return decode(runner, *given)

        StepRunner._decode = faulty_decode  # type: ignore[method-assign]


if __name__ == "__main__":
    put_fault(sys.argv[1])
    sys.exit(rollout.main(sys.argv[2:]))
