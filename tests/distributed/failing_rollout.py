"""tools/rollout.py with a fault put into one rank, to see that all ranks end and the right one explains.

torchrun --nproc-per-node 2 tests/distributed/failing_rollout.py FAULT --config ...

FAULT is raise, kill, stop, sleep, orphan, orphan_in_load or full; of rank 1, or of the one behind a colon ("stop:0").
`sleep` is code that does not come back; `orphan` kills the launcher, after which this rank comes to no collective any
more; `full` is a disk that is full after a few lines, of every rank that writes. With "+forever" at its end gloo waits
for ever, as NCCL does.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any, NoReturn

from torch.distributed import ProcessGroupGloo

from cpinfer.engine.step_runner import StepRunner
from cpinfer_tools import rollout

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
    fault, _, forever = fault.partition("+")
    fault, _, rank = fault.partition(":")
    if forever:
        ProcessGroupGloo._set_default_timeout = lambda *given: None
    if fault == "full":
        fill_the_disk()
        return
    if int(os.environ["RANK"]) == int(rank or FAULTY_RANK):
        decode = StepRunner._decode
        steps = iter(range(STEPS_BEFORE_FAULT))

        def faulty_decode(runner: StepRunner, *given: Any) -> Any:
            if next(steps, None) is None:
                FAULTS[fault]()
            return decode(runner, *given)

        if fault == "orphan_in_load":
            rollout.launch_inference = lambda *args: orphan()
        else:
            StepRunner._decode = faulty_decode  # type: ignore[method-assign]


def fail() -> NoReturn:
    raise RuntimeError("the fault that was put in")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(10**6)


def orphan() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(10**6)


FAULTS = {"raise": fail, "kill": kill, "stop": stop, "sleep": sleep, "orphan": orphan}


if __name__ == "__main__":
    fault, *arguments = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    put_fault(fault)
    sys.exit(rollout.main(arguments))
