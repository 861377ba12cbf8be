"""A rollout phase: the time in which a trainer lends its model, and gets it back bit for bit.

    trainer --lends--> Lent(module, topology, weights) --rollout_phase--> Engine --generate--> results
            <---------------------- everything as it was ----------------------

Who trains decides what lending takes. Data-parallel ranks have the weights already; ZeRO-3 and FSDP gather them first.
That is `Lent.weights`, which the adapters in `cpinfer_integrations` fill in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.optim.optimizer import register_optimizer_step_pre_hook

from cpinfer.comm.topology import Topology
from cpinfer.config import Config
from cpinfer.engine.attach import attach
from cpinfer.engine.engine import Engine


@dataclass(frozen=True)
class Lent:
    """What a trainer lends: its model, its ranks, and how the weights come to be usable for the length of a block.

    `module` is the Hugging Face model inside whatever the trainer wrapped around it. `weights` is entered before the
    engine attaches and left after it; collective over all ranks of the job. `num_copies` consecutive ranks train on the
    same data: those of the trainer's own tensor parallelism.
    """

    module: Any
    topology: Topology
    weights: Callable[[], AbstractContextManager[Any]] = nullcontext
    num_copies: int = 1


@contextmanager
def rollout_phase(
    lent: Lent, config: Config, *, tokenizer: Any | None = None, weights_version: int = 0
) -> Iterator[Engine]:
    """An engine on a trainer's own weights, its KV pool there for the length of the block only.

    `weights_version` is what results will say: count it up with every optimiser step. Afterwards parameters, gradients,
    optimiser state, random states, hooks and modes are those from before, also after an error or an interrupt.
    RuntimeError when an optimiser steps inside the block. Collective over all ranks of the job.
    """
    with (
        no_optimizer_steps(),
        lent.weights(),
        attach(lent.module, lent.topology, config, tokenizer=tokenizer) as engine,
    ):
        engine.weights_version = weights_version
        yield engine
        engine.sleep()


@contextmanager
def no_optimizer_steps() -> Iterator[None]:
    """Inside the block every torch optimiser of this process refuses to step."""

    def refuse_step(optimizer: Any, args: Any, kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() was called inside a rollout phase, whose samples would then come from "
            "two models; leave the phase first"
        )

    handle = register_optimizer_step_pre_hook(refuse_step)
    try:
        yield
    finally:
        handle.remove()
