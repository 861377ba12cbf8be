"""The check that a forward of the model takes attention of either kind from its step in every layer, once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from torch import Tensor

from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.linear_attention import LinearLayer, LinearStep
from cpinfer.attention.steps import AttentionStep
from cpinfer.errors import EngineFaultError
from cpinfer.ops.delta_rule import DeltaTokens


class EveryLayerOnce:
    """A step for one forward, which faults where a layer is passed over, comes twice, or sees another window.

    `windows`: what each layer is to see, as `ModelSpec.windows` has it. A layer whose attention is its module's own has
    no cache and no mask that fits packed tokens: what it computes is wrong, and nothing else would say so.
    `linear_layers` take theirs from `linear`, and have no place in the KV cache: others are counted without them.
    """

    def __init__(
        self,
        step: AttentionStep,
        windows: Sequence[int | None],
        linear: LinearStep | None = None,
        linear_layers: Sequence[int] = (),
    ) -> None:
        self.num_tokens = step.num_tokens
        self._step = step
        self._windows = windows
        self._linear = linear
        self._linear_layers = linear_layers
        self._next = 0
        self._num_cached = 0

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._check_order(layer.index, is_linear=False)
        if layer.window != (wanted := self._windows[layer.index]):
            raise EngineFaultError(
                f"layer {layer.index} attends with a window of {layer.window}; the model's config says {wanted}. "
                "Change windows in the config before the model is made from it."
            )
        place = self._num_cached
        self._next += 1
        self._num_cached += 1
        return self._step.attend(layer if place == layer.index else replace(layer, index=place), q, k, v)

    def convolve(self, layer: LinearLayer, x: Tensor) -> Tensor:
        return self._checked(layer).convolve(layer, x)

    def recur(self, layer: LinearLayer, tokens: DeltaTokens) -> Tensor:
        step = self._checked(layer)
        self._next += 1
        return step.recur(layer, tokens)

    def check_complete(self) -> None:
        """EngineFaultError when a layer has not attended."""
        if self._next < len(self._windows):
            raise EngineFaultError(
                f"the model ran and took attention from the engine in {self._next} of its {len(self._windows)} layers. "
                f"{self._passed_over(None)}"
            )

    def _checked(self, layer: LinearLayer) -> LinearStep:
        self._check_order(layer.index, is_linear=True)
        assert self._linear is not None, "a model with such layers has states"
        return self._linear

    def _check_order(self, index: int, *, is_linear: bool) -> None:
        if index != self._next or self._next == len(self._windows):
            self._fail(index, self._passed_over(index))
        if is_linear != (index in self._linear_layers):
            kinds = ("softmax", "linear") if is_linear else ("linear", "softmax")
            self._fail(index, f"It is one of {kinds[1]} attention, and {kinds[0]} attention by the model's config.")

    def _fail(self, index: int, why: str) -> NoReturn:
        raise EngineFaultError(
            f"attention of layer {index} was called after {self._next} of {len(self._windows)} layers. {why}"
        )

    def _passed_over(self, came: int | None) -> str:
        if came is not None and came < self._next:
            return "Layers share a layer_idx, or one ran twice: give each its own module and layer_idx."
        return (
            f"Layer {self._next} has a forward or an attention implementation of its own: use the model's own modules, "
            "and choose no implementation while an engine is attached."
        )
