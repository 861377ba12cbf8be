"""Which experts tokens go through, seen where a mixture of experts calls them.

A block hands its experts rows, and for each row the numbers of those that it goes through. That is looked at on the way
in, by hooks that are there for one forward at a time: where nobody asks, nothing is in the way.

Letters: T rows, L layers with experts, E experts of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpinfer.errors import EngineFaultError
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.unpadded_moe import is_moe_block

# Rows, the numbers of each row's experts, and their weights, behind `self`.
_NUM_ARGUMENTS = 4


class WatchedExperts:
    """What was seen of one forward."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = layers
        self._seen: dict[int, Tensor] = {}

    def note(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A hook before the forward of a layer's experts."""
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point())
        numbers = next(given, None)
        if numbers is None or layer in self._seen:
            what = "without the numbers of experts" if numbers is None else "twice"
            raise EngineFaultError(
                f"the experts of layer {layer}, a {type(module).__name__}, were called {what}. Leave "
                "sampling.routed_experts out, or use the model's own modules."
            )
        self._seen[layer] = numbers

    def rows(self, num_rows: int, num_experts: int) -> Tensor:
        """`[T, L, E]` int16: of each of `num_rows` rows that ran, layer by layer, its `num_experts` experts.

        EngineFaultError where a layer saw others. Without rows no layer is run.
        """
        if num_rows == 0:
            return torch.zeros(0, len(self._layers), num_experts, dtype=torch.int16)
        for layer in self._layers:
            found = tuple(self._seen[layer].shape) if layer in self._seen else None
            if found != (num_rows, num_experts):
                raise EngineFaultError(
                    f"layer {layer} called its experts with numbers of shape {found}; {(num_rows, num_experts)} was "
                    "wanted. Leave sampling.routed_experts out, or use the model's own modules."
                )
        return torch.stack([self._seen[layer] for layer in self._layers], dim=1).to(torch.int16)


@dataclass(frozen=True)
class ExpertLayers:
    """The experts of a model, by layer: several in one where an adapter keeps copies, of which one is in use."""

    experts: Mapping[int, tuple[Any, ...]]

    @classmethod
    def of(cls, model: Any) -> ExpertLayers:
        """Those of a causal LM, in order of its layers; none where it has none."""
        found = {
            index: tuple(module._modules["experts"] for module in layer.modules() if is_moe_block(module))
            for index, layer in enumerate(decoder_layers(model))
        }
        return cls({index: experts for index, experts in found.items() if experts})

    @property
    def unseen(self) -> str | None:
        """The first whose choice cannot be seen, in words; None where all can."""
        for index, experts in self.experts.items():
            for module in experts:
                if not _is_told(module):
                    return f"layer {index} with experts in a {type(module).__name__}"
        return None if self.experts else "a model without a layer of experts"

    @contextmanager
    def watched(self) -> Iterator[WatchedExperts]:
        """A block for one forward, of which it sees what goes to experts."""
        watched = WatchedExperts(tuple(self.experts))
        with ExitStack() as stack:
            for index, experts in self.experts.items():
                for module in experts:
                    hook = partial(watched.note, index)
                    # First, so that it sees what the block hands over, not what other hooks make of it.
                    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                    stack.callback(handle.remove)
            yield watched


def _is_told(module: Any) -> bool:
    """Whether experts are called with the numbers of those that rows go through: one module for all of a layer."""
    while "base_layer" in module._modules:  # of an adapter
        module = module._modules["base_layer"]
    parameters = inspect.signature(type(module).forward).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) >= _NUM_ARGUMENTS
