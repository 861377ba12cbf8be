"""The check that a forward of the model takes attention from its step in every layer, once, in order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.steps import AttentionStep
from cpinfer.errors import EngineFaultError


class EveryLayerOnce:
    """A step for one forward, which faults where a layer is passed over, comes twice, or sees another window.

    `windows`: what each layer is to see, as `ModelSpec.windows` has it. A layer whose attention is its module's own has
    no cache and no mask that fits packed tokens: what it computes is wrong, and nothing else would say so.
    """

    def __init__(self, step: AttentionStep, windows: Sequence[int | None]) -> None:
        self.num_tokens = step.num_tokens
        self._step = step
        self._windows = windows
        self._next = 0

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer.index != self._next or self._next == len(self._windows):
            raise EngineFaultError(
                f"attention of layer {layer.index} was called after {self._next} of {len(self._windows)} layers. "
                f"{self._passed_over(layer.index)}"
            )
        if layer.window != (wanted := self._windows[layer.index]):
            raise EngineFaultError(
                f"layer {layer.index} attends with a window of {layer.window}; the model's config says {wanted}. "
                "Change windows in the config before the model is made from it."
            )
        self._next += 1
        return self._step.attend(layer, q, k, v)

    def check_complete(self) -> None:
        """EngineFaultError when a layer has not attended."""
        if self._next < len(self._windows):
            raise EngineFaultError(
                f"the model ran and took attention from the engine in {self._next} of its {len(self._windows)} layers. "
                f"{self._passed_over(None)}"
            )

    def _passed_over(self, came: int | None) -> str:
        if came is not None and came < self._next:
            return "Layers share a layer_idx, or one ran twice: give each its own module and layer_idx."
        return (
            f"Layer {self._next} has a forward or an attention implementation of its own: use the model's own modules, "
            "and choose no implementation while an engine is attached."
        )
