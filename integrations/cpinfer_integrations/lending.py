"""What a training job lends to rollouts, whatever wraps its model: DeepSpeed's engine, DDP, FSDP2, or nothing.

A new trainer is a module beside this one with a `lend(module, config)`, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from cpinfer.colocate.phase import Lent
from cpinfer.comm.topology import Topology
from cpinfer.config import ConfigLike, JobConfig, job_config
from cpinfer.models.wrappers import refuse_all_but_models, without_replication
from cpinfer.refusals import refuse
from cpinfer_integrations import fsdp
from cpinfer_integrations.job_ranks import grid_of_replicas

__all__ = ["lend"]


class TrainerModule(Protocol):
    """What the module of a row has."""

    def lend(self, module: Any, config: JobConfig) -> Lent:
        """What this trainer lends, its weights as `config.rollout.gather` says. Collective.

        UnsupportedError, by the table of refusals, for what it cannot.
        """
        ...


class TrainerRow(NamedTuple):
    """One kind of trainer: the module that lends for it, imported when it is met, and how its model is known.

    `knows` is asked of what is left without torch.compile and DDP, and imports nothing of the trainer's library.
    """

    module: str
    knows: Callable[[Any], bool]

    @property
    def code(self) -> TrainerModule:
        return cast("TrainerModule", import_module(self.module))


def _is_of_deepspeed(module: Any) -> bool:
    return type(module).__module__.startswith("deepspeed.")


def _is_fsdp2(module: Any) -> bool:
    return bool(fsdp.sharded_modules(module))


def _has_tp_mesh(module: Any) -> bool:
    return "tp" in fsdp.mesh_axes(module)


# In the order in which they are asked; where none knows the model, its weights lie where they are used.
TRAINERS: Mapping[str, TrainerRow] = {
    "deepspeed": TrainerRow("cpinfer_integrations.deepspeed", _is_of_deepspeed),
    "fsdp": TrainerRow("cpinfer_integrations.fsdp", _is_fsdp2),
    "transformers": TrainerRow("cpinfer_integrations.transformers", _has_tp_mesh),
}


def lend(trained: Any, config: ConfigLike = None) -> Lent:
    """The model, ranks and weights of a job, from what its training loop calls forward on. Collective.

    Args:
        trained: a DeepSpeed engine, a model under `DistributedDataParallel`, one on which FSDP2's `fully_shard` was
            called, one that Transformers shards by tensor parallelism, or a bare model; any of them compiled, and so is
            what an Accelerator's `prepare` makes of one.
        config: the layout, and under `rollout` how weights are gathered that the trainer has sharded: a `JobConfig`, a
            dict of its keys, the path of a JSON file, or nothing.

    Returns:
        What `rollout_phase` takes.

    Raises:
        UserError: when the config's sizes do not fit the job, and for what is no model of Transformers and of no
            trainer of `TRAINERS`.
        UnsupportedError: for what the table of refusals names.
    """
    config = job_config(config)
    if not isinstance(trained, nn.Module):
        refuse_all_but_models(trained, "lend")
    module = without_replication(trained)
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise refuse("fsdp1", f"a {type(module).__name__}")
    for row in TRAINERS.values():
        if row.knows(module):
            return row.code.lend(module, config)
    refuse_all_but_models(module, "lend")
    fsdp.refuse_sharded_from_outside(module)
    if config.rollout.gather == "tp_shards":
        raise refuse("tp_shards_owner", f"a {type(trained).__name__}")
    return Lent(module, Topology.from_world(grid_of_replicas(config)))
