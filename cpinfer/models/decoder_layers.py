"""The decoder layers of a model, whatever its family calls them."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers in order. ValueError for a model that keeps them in no list of their own."""
    num_layers = model.config.num_hidden_layers
    for module in model.modules():  # from the outside in: lists of experts lie deeper
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} decoder layers")
