"""This rank's slice of a weight, whatever shards it, and what a model's weights take up.

AutoTP keeps plain tensors, Transformers TP keeps DTensors. ZeRO-3 leaves an empty tensor where a weight was that it has
sharded, with the whole shape beside it, and FSDP a DTensor: both bring the whole weight when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cpinfer.errors import UserError
from cpinfer.refusals import refuse

WeightKind = tuple[torch.dtype, torch.device | None]
# What the engine computes in; a cache has no other.
_USABLE = frozenset((torch.float32, torch.bfloat16, torch.float16))
# What codes are kept in; buffers of indices are of int64, masks of bool.
_CODES = frozenset((torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2))


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
    # FSDP makes whole what it has sharded itself; what tensor parallelism has cut stays cut.
    shape, mesh = list(weight.shape), weight.device_mesh
    for name, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, weight.placements, strict=False):
        if name == "tp" and placement.is_shard():
            shape[placement.dim] //= size
    return tuple(shape)


def is_dealt_out(weight: Any) -> bool:
    """Whether ZeRO-3 has sharded a weight, and nobody has made it whole."""
    return hasattr(weight, "ds_id") and not weight.numel()


def is_fsdp(module: Any) -> bool:
    """Whether FSDP2's hooks on this module bring its weights."""
    return hasattr(type(module), "set_reshard_after_forward")


def has_fsdp(model: Any) -> bool:
    """Whether FSDP2's hooks on some module of a model bring weights."""
    return any(map(is_fsdp, model.modules()))


def dtype_in_use(model: Any, layer: Any) -> torch.dtype:
    """The dtype that the weights of `layer` in `model` have when they are used.

    FSDP may bring them in another than it keeps: by the innermost call of `fully_shard` around them.
    """
    weight = next(layer.parameters())
    kept: torch.dtype = weight.dtype
    around = [part for part in model.modules() if is_fsdp(part) and any(x is weight for x in part.parameters())]
    brought = around[-1]._get_fsdp_state()._mp_policy.param_dtype if around else None
    return brought or kept


def weight_kind(weight: Any, *, gathered_by_fsdp: bool = False) -> WeightKind | None:
    """Dtype and device of a weight that stays what it is between steps; no device where it comes and goes.

    FSDP's have a kind while they are sharded: it may bring them in another dtype, and leave them there.
    """
    if gathered_by_fsdp:
        return (weight.dtype, None) if hasattr(weight, "device_mesh") else None
    return weight.dtype, None if hasattr(weight, "ds_id") else weight.device


def refuse_unusable_weights(model: Any) -> None:
    """UserError for weights that are no numbers of a model's, or codes for them, or that do not lie on one device."""
    for name, module in model.named_modules():
        if callable(getattr(type(module), "weight", None)):  # as torch.ao has it
            raise refuse("quantized_weights", f"{name} is a {type(module).__module__}.{type(module).__name__}")
    for name, weight in model.named_parameters():
        if _is_quantized(weight):
            raise refuse("quantized_weights", f"{name} is a {type(weight).__name__} of {weight.dtype}")
        if _is_missing(weight, model.get_submodule(name.rpartition(".")[0])):
            raise UserError(
                f"{name} is empty on this rank; whole weights were wanted. Where a trainer keeps them elsewhere, lend "
                "its model by a context that brings them (docs/extending/trainer.md)."
            )
        if weight.dtype not in _USABLE:
            raise UserError(
                f"{name} is of {weight.dtype}; weights in {', '.join(sorted(map(_name, _USABLE)))} were wanted. "
                "Make a copy of the model in one of them, as by model.float()."
            )
    for name, buffer in model.named_buffers():
        if buffer.dtype in _CODES and buffer.ndim > 1:  # as GPTQ and AWQ have them
            raise refuse("quantized_weights", f"{name} holds codes in {buffer.dtype}")
    kinds = filter(None, map(weight_kind, model.parameters()))
    devices = {str(device) for _, device in kinds if device is not None}
    devices |= {"meta" for buffer in model.buffers() if buffer.is_meta}
    if len(devices) > 1 or "meta" in devices:
        raise refuse("device_map", f"weights on {', '.join(sorted(devices))}")


def _is_missing(weight: Any, module: Any) -> bool:
    """Whether there is nothing where a weight of `module` was, and no note of its shape, as ZeRO-3 and FSDP have one.

    A bias whose matrix is cut to no rows has none either: AutoTP's inference deals the width of an MLP out in steps of
    64 (seen in 0.19), so with fewer steps than ranks some of them have nothing to add.
    """
    if tuple(getattr(weight, "ds_shape", weight.shape)) != (0,):
        return False
    matrix = module._parameters.get("weight")
    return matrix is None or matrix.ndim < 2 or matrix.shape[0] > 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_quantized(weight: Any) -> bool:
    """Whether the values kept are codes: integers or bytes, whatever dtype a tensor subclass says it is of."""
    if hasattr(weight, "__tensor_flatten__"):
        inside = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
        return any(_is_quantized(x) for x in inside if isinstance(x, Tensor))
    return not (weight.is_floating_point() or weight.is_complex()) or weight.dtype.itemsize < 2


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind `tensors`, what several share counted once."""
    storages = {(local(x).device, local(x).untyped_storage().data_ptr()): local(x).untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())
