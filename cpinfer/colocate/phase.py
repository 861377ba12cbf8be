"""A phase of colocated rollouts: the time in which a trainer lends its model, and gets it back bit for bit.

A hybrid engine without a second copy of the weights, and so without weights to synchronise:

    trainer --lends--> Lent(module, topology, weights) --rollout_phase--> Engine --generate--> results
            <---------------------- everything as it was ----------------------  (and a PhaseReport, who wants it)

Who trains decides what lending takes. Data-parallel ranks have the weights already; ZeRO-3 and FSDP gather them first.
That is `Lent.weights`, which the adapters in `cpinfer_integrations` fill in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from torch.optim.optimizer import register_optimizer_step_pre_hook

from cpinfer.comm.topology import Topology
from cpinfer.config import ConfigLike
from cpinfer.engine.attach import attach
from cpinfer.engine.engine import Engine
from cpinfer.errors import UserError
from cpinfer.models.local_weights import storage_bytes


@dataclass(frozen=True)
class Lent:
    """What a trainer lends: its model, its ranks, and how the weights come to be usable for the length of a block.

    Attributes:
        module: the Hugging Face model inside whatever the trainer wrapped around it.
        topology: its ranks.
        weights: entered before the engine attaches and left after it; collective over all ranks of the job. Where
            weights come and go inside, it yields the most bytes of them that are there at once.
        how: a word for it.
        num_copies: consecutive ranks that train on the same data: those of the trainer's own tensor parallelism.
    """

    module: Any
    topology: Topology
    weights: Callable[[], AbstractContextManager[int | None]] = nullcontext
    how: str = "in_place"
    num_copies: int = 1


@dataclass(frozen=True)
class PhaseReport:
    """What a phase cost this rank beside its rollouts: seconds, and bytes.

    With the block's own time its four times make the phase's.

    Attributes:
        how: how the weights were lent, in a word.
        gather_s: to bring the weights.
        attach_s: to put the engine on them with its KV pool.
        detach_s: to take the engine off again, after the block.
        release_s: to give the weights back.
        weights_bytes: of the parameters that the forward uses, those of the trainer that it uses in place included;
            what the trainer keeps beside them (its partitions, optimiser state) is not in it.
        kv_pool_bytes: of the KV pool on this rank.
    """

    how: str
    gather_s: float
    attach_s: float
    detach_s: float
    release_s: float
    weights_bytes: int
    kv_pool_bytes: int


@contextmanager
def rollout_phase(
    lent: Lent,
    config: ConfigLike = None,
    *,
    tokenizer: Any | None = None,
    weights_version: int = 0,
    report: Callable[[PhaseReport], Any] | None = None,
) -> Iterator[Engine]:
    """An engine on a trainer's own weights, its KV pool there for the length of the block only.

    Afterwards parameters, gradients, optimiser state, random states, hooks and modes are those from before, also after
    an error or an interrupt. Collective over all ranks of the job.

    Args:
        lent: what the trainer lends, as `cpinfer_integrations.lending.lend` finds it.
        config: what `cpinfer.attach` takes; sizes in it are those of what is lent.
        tokenizer: for prompts that are text, stop strings, and the text of results.
        weights_version: what results will say; count it up with every optimiser step.
        report: called with what the phase cost, after one that did not fail.

    Yields:
        The engine, awake.

    Raises:
        RuntimeError: when an optimiser steps inside the block; other errors as `cpinfer.attach`. RanksMissingError
            comes on those that wait when a rank is stopped or stuck.
        UserError: for anything but a `Lent`, before anything else.
    """
    if not isinstance(lent, Lent):
        raise UserError(
            f"rollout_phase was given a {type(lent).__name__}; a cpinfer.Lent was wanted. Make one, once per job: "
            "cpinfer_integrations.lending.lend(model, config)."
        )
    laps = [time.perf_counter()]
    watch = lent.topology.watch
    with watch.running(), watch.at("a rollout phase"), no_optimizer_steps(), lent.weights() as most_bytes:
        laps.append(time.perf_counter())
        with attach(lent.module, lent.topology, config, tokenizer=tokenizer) as engine:
            engine.weights_version = weights_version
            weights_bytes = storage_bytes(lent.module.parameters()) if most_bytes is None else most_bytes
            kv_pool_bytes = engine.kv_pool_bytes
            laps.append(time.perf_counter())
            yield engine
            laps.append(time.perf_counter())
            engine.sleep()
        laps.append(time.perf_counter())
    laps.append(time.perf_counter())
    gather_s, attach_s, _, detach_s, release_s = (end - start for start, end in pairwise(laps))
    cost = PhaseReport(lent.how, gather_s, attach_s, detach_s, release_s, weights_bytes, kv_pool_bytes)
    lent.topology.logger(__name__).shared("phase of weights version %d: %s", weights_version, cost)
    if report is not None:
        report(cost)


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
