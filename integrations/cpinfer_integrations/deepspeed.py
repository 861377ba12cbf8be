"""DeepSpeed: a topology from an engine that a job holds, or an inference engine for a job that has none yet.

Two of DeepSpeed's habits are worked around here (seen in 0.19). Its shared-memory collectives for CPU ignore process
groups and are compiled on first use, so they are switched off. And `init_inference` builds its tensor-parallel group
from ranks `0..tp-1` alone, unless it is given both an `mpu` and a `tp_group`.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cpinfer.colocate.phase import Lent
from cpinfer.colocate.weight_slices import sliced_projections
from cpinfer.comm.topology import Topology, new_group
from cpinfer.config import ConfigLike, JobConfig, job_config
from cpinfer.engine.attach import config_errors, model_spec
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.kv_expansion import expand_kv_heads
from cpinfer.models.loading import PartlyRead
from cpinfer.packages import named
from cpinfer.refusals import refuse
from cpinfer_integrations import deepspeed_zero3 as zero3
from cpinfer_integrations.deepspeed_loading import cut_as_read, with_split_projections
from cpinfer_integrations.deepspeed_rollout import CpinferRolloutBatch, CpinferRolloutEngine

try:
    import deepspeed
    from deepspeed.inference.engine import InferenceEngine
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = [
    "CpinferRolloutBatch",
    "CpinferRolloutEngine",
    "LaunchedInference",
    "init_distributed",
    "launch_inference",
    "lend",
    "topology_from",
]


def topology_from(engine: Any, *, pcp_size: int | None = None, dcp_size: int | None = None) -> Topology:
    """The topology of a DeepSpeed engine: its own tensor-parallel group, and its data-parallel ranks lent to prefill.

    Groups that the engine has are used as they are; only missing ones are created. Collective.

    Args:
        engine: of `deepspeed.init_inference`, or of `deepspeed.initialize` with or without `autotp_size`.
        pcp_size: ranks that share a prefill; default: all data-parallel ranks.
            A smaller one leaves the rest as dp replicas.
        dcp_size: KV shards of a sequence; default: `pcp_size`.

    Returns:
        This rank's topology; `close` it to destroy what was created.

    Raises:
        ValueError: for sizes that do not fit the job.
        UnsupportedError: for what the table of refusals names.
    """
    tp_group, lent = _groups_of(engine)
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    if isinstance(engine, InferenceEngine):  # AutoTP's layers sum by the group in training
        _check_sums(tp_size)
    num_replicas = dist.get_world_size() // tp_size if dist.is_initialized() else 1
    grid = RankGrid.lending(tp_size, num_replicas, pcp_size, dcp_size)
    return Topology.from_world(grid, tp_group=tp_group, lent=lent)


def lend(engine: Any, config: ConfigLike = None) -> Lent:
    """What the engine of a training job lends to rollouts: its module, and its data-parallel ranks as pcp ranks.

    Under ZeRO 0, 1 and 2 the weights are where they are used. Under ZeRO-3 they come as `rollout.gather` says; with
    "tp_shards" the data-parallel ranks serve as tp x pcp. Collective.

    Args:
        engine: of `deepspeed.initialize`.
        config: the layout, and under `rollout` how weights are gathered.

    Returns:
        What `rollout_phase` takes.

    Raises:
        ValueError: when the config's sizes do not fit the job.
        UnsupportedError: for what the table of refusals names.
    """
    config = job_config(config)
    if engine.torch_autocast_enabled():
        raise refuse("engine_autocast", "the engine's config has torch_autocast enabled")
    module, gather = engine.module, config.rollout.gather
    if gather == "tp_shards":
        return _lend_tp_shards(engine, config)
    topology = topology_from(engine, pcp_size=config.pcp_size, dcp_size=config.dcp_size)
    lent = Lent(module, topology, num_copies=topology.grid.tp_size)
    if engine.zero_optimization_stage() < 3:
        return lent
    if gather == "full":
        return replace(lent, weights=partial(zero3.full, module), how=gather)
    if topology.grid.dp_size > 1:
        topology.close()
        raise refuse("layerwise_replicas", f"{topology.grid.dp_size} replicas")
    return replace(lent, weights=partial(zero3.layerwise, module), how=gather)


def _lend_tp_shards(engine: Any, config: JobConfig) -> Lent:
    if engine.zero_optimization_stage() < 3 or engine.autotp_size() > 1:
        found = f"ZeRO stage {engine.zero_optimization_stage()}, autotp_size {engine.autotp_size()}"
        raise refuse("tp_shards_owner", found)
    if config.tp_size == 1:
        raise UserError('rollout.gather is "tp_shards" and tp_size 1; give tensor_parallel.tp_size above 1.')
    module, spec = engine.module, model_spec(engine.module)
    check = config_errors(spec, config)
    if check:
        raise UserError(" ".join(check))
    if dist.get_world_size() % config.tp_size:
        raise UserError(
            f"tp={config.tp_size} does not divide the job's {dist.get_world_size()} ranks. Give another "
            "tensor_parallel.tp_size."
        )
    num_replicas = dist.get_world_size() // config.tp_size
    grid = RankGrid.lending(config.tp_size, num_replicas, config.pcp_size, config.dcp_size)
    sliced_projections(module, spec, config.tp_size, 0)  # what cannot be sliced is refused now
    topology = Topology.from_world(grid, slices_weights=True)
    return Lent(module, topology, partial(zero3.tp_shards, module, spec, topology.tp), "tp_shards")


def init_distributed() -> None:
    """Make DeepSpeed use the default process group, which must exist, without compiling anything.

    Its sums in shared memory stay off: they are right only where all ranks of a job are one tensor-parallel group.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


@dataclass(frozen=True)
class LaunchedInference:
    """A DeepSpeed inference engine, its model sharded by tensor parallelism, and the topology around it.

    Attributes:
        engine: DeepSpeed's.
        topology: this rank's, which owns the groups made for it.
    """

    engine: Any
    topology: Topology

    @property
    def module(self) -> Any:
        return self.engine.module


def launch_inference(model: Any, grid: RankGrid, *, dtype: torch.dtype) -> LaunchedInference:
    """Shard `model` over the tp axis of `grid` with DeepSpeed's AutoTP, for jobs that have no engine yet.

    The default process group must exist. Collective over all ranks.

    Args:
        model: a Hugging Face causal LM, whole on every rank, or a `PartlyRead` one, of which each rank then reads the
            part that it keeps; it is changed in place, its K/V heads expanded first where tp exceeds them.
        grid: the layout, of all ranks.
        dtype: of the weights.

    Returns:
        The engine, and the topology, to which the groups made here belong.

    Raises:
        UnsupportedError: for what the table of refusals names.
    """
    init_distributed()
    _check_sums(grid.tp_size)
    tp_group, owned = None, []
    for ranks in grid.tp_groups:
        group = new_group(ranks)
        if dist.get_rank() in ranks:
            tp_group, owned = group, [group]
    partly = model if isinstance(model, PartlyRead) else PartlyRead(model, {})
    spec, cut = model_spec(partly.model), partial(cut_by_autotp, grid=grid, tp_group=tp_group, dtype=dtype)
    if spec.states is not None and grid.tp_size > 1:
        partly = with_split_projections(partly, spec.states, grid.tp_size)
    engine = cut_as_read(partly, dtype, spec.head_dim, cut)
    topology = topology_from(engine, pcp_size=grid.pcp_size, dcp_size=grid.dcp_size)
    return LaunchedInference(engine, topology.owning(owned))


def cut_by_autotp(model: Any, grid: RankGrid, tp_group: Any, dtype: torch.dtype) -> Any:
    """AutoTP's engine of a model."""
    expand_kv_heads(model, grid.tp_size)
    with redirect_stdout(io.StringIO()):  # every rank prints what it shards
        return deepspeed.init_inference(
            model,
            dtype=dtype,
            replace_with_kernel_inject=False,
            injection_policy=_row_parallel(model),
            tensor_parallel={"tp_size": grid.tp_size, "mpu": _ModelParallelUnit(tp_group), "tp_group": tp_group},
        )


def _check_sums(tp_size: int) -> None:
    """UnsupportedError where AutoTP's layers would add up what ranks of other tensor-parallel groups have.

    A job that has called `deepspeed.init_distributed` itself may have DeepSpeed's op for it (seen in 0.19).
    """
    op = getattr(deepspeed.comm.comm.cdb, "shm_comm_op", None)
    if op is not None and 1 < tp_size < dist.get_world_size():
        raise refuse("deepspeed_shared_memory", f"tp_size {tp_size} of {dist.get_world_size()} ranks")


def _row_parallel(model: Any) -> dict[type, tuple[str, ...]] | None:
    """The projections of attention whose partial sums are added, None where AutoTP finds them by itself.

    It looks at the first layer of a class alone, and cuts the rows of what it has not seen there (seen in 0.19).
    """
    layers = decoder_layers(model)
    found = [
        {
            ".".join(name.split(".")[-2:])
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(("o_proj", "out_proj"))
        }
        for layer in layers
    ]
    names = set().union(*found)
    return None if names == found[0] else {type(layers[0]): tuple(sorted(names))}


@dataclass(frozen=True)
class _ModelParallelUnit:
    """What DeepSpeed asks of Megatron's `mpu`: which group, how large, and where in it this rank is."""

    group: Any

    def get_model_parallel_group(self) -> Any:
        return self.group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.group)


def _groups_of(engine: Any) -> tuple[Any | None, list[Any]]:
    """The engine's tensor-parallel group (None without tensor parallelism), and its other groups an axis may use."""
    if isinstance(engine, InferenceEngine):
        return engine.mp_group, []
    if engine.autotp_size() > 1:
        mpu = engine.mpu
        return mpu.get_tensor_model_parallel_group(), [mpu.get_data_parallel_group()]
    return None, []
