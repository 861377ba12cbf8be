"""This rank's slice of a weight, whatever shards it, and what a model's weights take up.

AutoTP keeps plain tensors, Transformers TP keeps DTensors. ZeRO-3 leaves an empty tensor where a weight was that it has
dealt out, with the whole shape beside it, and FSDP a DTensor: both bring the whole weight when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def local(weight: Tensor) -> Tensor:
    """The values that are here, without a copy."""
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()


def shape_in_use(weight: Any, *, gathered_by_fsdp: bool = False) -> tuple[int, ...]:
    """The shape that a weight has on this rank when its module runs."""
    dealt = getattr(weight, "ds_shape", None)
    if dealt is not None:
        return tuple(dealt)
    if not gathered_by_fsdp or not hasattr(weight, "device_mesh"):
        return tuple(local(weight).shape)
    # FSDP makes whole what it has dealt out itself; what tensor parallelism has cut stays cut.
    shape, mesh = list(weight.shape), weight.device_mesh
    for name, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, weight.placements, strict=False):
        if name == "tp" and placement.is_shard():
            shape[placement.dim] //= size
    return tuple(shape)


def is_fsdp(model: Any) -> bool:
    """Whether FSDP2's hooks on the outermost module bring the weights."""
    return hasattr(model, "set_reshard_after_forward")


def dtype_in_use(model: Any) -> torch.dtype:
    """The dtype that a model's weights have when they are used: FSDP may bring them in another than it keeps."""
    kept: torch.dtype = model.get_input_embeddings().weight.dtype
    brought = model._get_fsdp_state()._mp_policy.param_dtype if is_fsdp(model) else None
    return brought or kept


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind `tensors`, what several share counted once."""
    storages = {(local(x).device, local(x).untyped_storage().data_ptr()): local(x).untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())
