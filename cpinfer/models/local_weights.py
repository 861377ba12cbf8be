"""This rank's slice of a weight, whatever shards it: AutoTP keeps plain tensors, Transformers TP keeps DTensors."""

from __future__ import annotations

from torch import Tensor


def local(weight: Tensor) -> Tensor:
    """The values that are here, without a copy."""
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()
