"""tools/rollout.py with a fault put into one rank, to see that all ranks end and the right one explains.

torchrun --nproc-per-node 2 tests/distributed/failing_rollout.py {raise|kill} --config ...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import rollout
from cpinfer.engine.step_runner import StepRunner

FAULTY_RANK = 1
STEPS_BEFORE_FAULT = 5


def put_fault(fault: str) -> None:
    """Make this rank fail after a few decode steps, if it is the faulty one."""
    if int(os.environ["RANK"]) == FAULTY_RANK:
        decode = StepRunner._decode
        steps = iter(range(STEPS_BEFORE_FAULT))

        def faulty_decode(runner: StepRunner, running: Any) -> Any:
            if next(steps, None) is None:
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the fault that was put in")
            return decode(runner, running)

        StepRunner._decode = faulty_decode  # type: ignore[method-assign]


if __name__ == "__main__":
    put_fault(sys.argv[1])
    sys.exit(rollout.main(sys.argv[2:]))
