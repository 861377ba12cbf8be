"""FSDP2 (`fully_shard`): weights that every rank holds a part of, made whole for a phase in one of two ways.

    full        all at once, FSDP's hooks asleep
    layerwise   FSDP's own hooks, which bring a module's weights when it runs

Afterwards what was sharded is sharded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cpinfer.colocate.phase import Lent
from cpinfer.comm.topology import Topology
from cpinfer.config import JobConfig
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.hooks import hooks_disabled
from cpinfer.models.wrappers import is_hugging_face, refuse_all_but_models, unwrapped
from cpinfer.refusals import refuse
from cpinfer_integrations.job_ranks import grid_of_replicas

_OWNER = "torch.distributed"


def lend(module: nn.Module, config: JobConfig) -> Lent:
    """What a job lends whose model FSDP2 shards: all ranks, and weights as `config.rollout.gather` says. Collective.

    Args:
        module: one on which `fully_shard` was called, or on parts of it.
        config: the layout, and under `rollout` how weights are gathered.

    Returns:
        What `rollout_phase` takes.

    Raises:
        UnsupportedError: for what the table of refusals says of FSDP2.
    """
    gather = config.rollout.gather
    refuse_unsupported(module, gather)
    refuse_all_but_models(module, "lend")
    grid = grid_of_replicas(config)
    if gather == "layerwise" and grid.dp_size > 1:
        raise refuse("layerwise_replicas", f"{grid.dp_size} replicas")
    weights = full if gather == "full" else layerwise
    return Lent(module, Topology.from_world(grid), partial(weights, module), gather)


def sharded_modules(module: nn.Module) -> list[Any]:
    """The modules on which `fully_shard` was called, from the outside in: `nn.Module` and `FSDPModule` both."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def mesh_axes(module: nn.Module) -> set[str]:
    """The names of the axes of all device meshes on which weights lie."""
    return {name for x in module.parameters() if isinstance(x, DTensor) for name in x.device_mesh.mesh_dim_names or ()}


def refuse_sharded_from_outside(module: nn.Module) -> None:
    """UnsupportedError when a module around `module` has its weights sharded, so nothing in it brings them."""
    brought = {id(x) for part in sharded_modules(module) for x in part.parameters()}
    for name, x in module.named_parameters():
        if isinstance(x, DTensor) and id(x) not in brought:
            raise refuse("fsdp_root", f"{name} of a {type(module).__name__}, sharded by a module around it")


@contextmanager
def full(module: nn.Module) -> Iterator[None]:
    """All parameters are whole for the length of the block. Collective."""
    with _sharded_again(module), hooks_disabled(module, _OWNER):
        for part in sharded_modules(module):
            part.unshard()
        yield


@contextmanager
def layerwise(module: nn.Module) -> Iterator[int]:
    """A module's parameters are whole while it runs. Yields the most bytes of weights there at once, as a bound.

    Each step inside the block is collective, and all ranks must run the same ones.
    """
    with _sharded_again(module):
        yield _most_bytes(module)


def refuse_unsupported(module: nn.Module, gather: str) -> None:
    """UnsupportedError for what the table of refusals says of FSDP2."""
    names = mesh_axes(module)
    if "tp" in names:
        raise refuse("fsdp_tp", f"a device mesh with axes {', '.join(sorted(names))}")
    if gather == "tp_shards":
        raise refuse("tp_shards_owner", "an FSDP2 model")
    if isinstance(module, FSDPModule) and not is_hugging_face(unwrapped(module)):
        raise refuse("fsdp_root", f"a {type(module).__name__}")
    refuse_sharded_from_outside(module)


@contextmanager
def _sharded_again(module: nn.Module) -> Iterator[None]:
    parts = sharded_modules(module)
    before = [part for part in parts if _is_sharded(part)]
    try:
        yield
    except BaseException:
        # FSDP believes itself in the forward that failed, where its outermost module is not to be sharded again.
        # (torch before 2.13 has no word for it.)
        for part in _outermost(parts):
            if hasattr(part, "reset_iter_state") and part._get_fsdp_state()._is_root:  # None before its first forward
                part.reset_iter_state()
        raise
    finally:
        for part in before:
            part.reshard()


def _outermost(parts: list[Any]) -> list[Any]:
    """Those that are inside no other: the model, or its layers where `fully_shard` was called on them alone."""
    inside = {module for part in parts for module in part.modules() if module is not part}
    return [part for part in parts if part not in inside]


def _is_sharded(part: nn.Module) -> bool:
    """Whether the parameters that belong to this call of `fully_shard` are sharded now."""
    nested = {id(x) for other in sharded_modules(part) if other is not part for x in other.parameters()}
    return any(isinstance(x, DTensor) for x in part.parameters() if id(x) not in nested)


def _most_bytes(module: Any) -> int:
    """All that is outside the layers, and two layers: one runs, the next is on its way.

    FSDP leaves whole what its outermost calls brought. Where those are the layers, it is the model in the end.
    """
    layers = [_whole_bytes(layer) for layer in decoder_layers(unwrapped(module))]
    if len(_outermost(sharded_modules(module))) > 1:
        return _whole_bytes(module)
    return _whole_bytes(module) - sum(layers) + sum(sorted(layers)[-2:])


def _whole_bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in module.parameters())
