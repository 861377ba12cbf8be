"""A rank of a training job stops, or waits in other code, within a rollout phase; the others say what came of it.

hung_worker.py KIND FAULT RANK: kinds as lending_worker.py has them, FAULT is stop, sleep or none, of RANK in its
third step. A rank that goes on prints a line of JSON: the error, and what has changed of the trainer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from lending_costs import GREEDY, PROMPTS
from lending_worker import config_of, trainer_of

from cpinfer.colocate.phase import rollout_phase
from cpinfer.engine.step_runner import StepRunner
from cpinfer.errors import RanksMissingError
from cpinfer_integrations.deepspeed import init_distributed
from cpinfer_integrations.lending import lend
from trainers import changes, photograph

TIMEOUT_S = 1.0
STEPS_BEFORE_FAULT = 3
FAILED = 3
FAULTS: dict[str, Callable[[], object]] = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(10**6),
}


def put_fault(fault: str) -> None:
    """The fault comes in a later step of this process."""
    run, steps = StepRunner.run, iter(range(STEPS_BEFORE_FAULT))

    def faulty_run(runner: StepRunner, *given: Any) -> Any:
        if next(steps, None) is None:
            FAULTS[fault]()
        return run(runner, *given)

    StepRunner.run = faulty_run  # type: ignore[method-assign]


def phase(kind: str) -> dict[str, Any]:
    """What a phase raises, how long after it began, and what it leaves behind."""
    trainer = trainer_of(kind)
    trainer.micro_step()  # gradients are there
    before, lent = photograph(trainer), lend(trainer.trained, replace(config_of(kind), collective_timeout_s=TIMEOUT_S))
    told: dict[str, Any] = {"rank": dist.get_rank(), "missing": [], "error": ""}
    start_s = time.monotonic()
    try:
        with rollout_phase(lent, replace(config_of(kind), collective_timeout_s=TIMEOUT_S)) as engine:
            engine.generate(PROMPTS, GREEDY)
    except RanksMissingError as error:
        told = {**told, "missing": list(error.ranks), "error": str(error)}
    return {**told, "phase_s": round(time.monotonic() - start_s, 1), "changed": changes(before, photograph(trainer))}


if __name__ == "__main__":
    kind, fault, faulty_rank = sys.argv[1:]
    dist.init_process_group("gloo")  # as trainers have it: half an hour
    init_distributed()
    if fault != "none" and dist.get_rank() == int(faulty_rank):
        put_fault(fault)
    told = phase(kind)
    print(json.dumps(told), flush=True)
    os._exit(FAILED if told["missing"] else 0)  # what is left of the job's groups waits for a rank that does not come
