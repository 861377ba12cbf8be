"""Keywords that a family's layers do not hand on to its attention: the calls of its attention get them here.

Attention functions know of a forward what its keywords say: the engine's step, a window. Where a family's code drops
one on the way, the forward of each attention module is replaced by one that adds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from cpinfer.models.attachment import replaced
from cpinfer.models.decoder_layers import attention_modules, decoder_layers
from cpinfer.models.families import FAMILIES


class HandedStep:
    """The step of the forward that runs, None between two. One is made for each engine, and set by it."""

    def __init__(self) -> None:
        self.step: Any = None

    @contextmanager
    def over(self, step: Any) -> Iterator[None]:
        """For the length of the block, that of a forward, `step` is what attention modules are called with."""
        self.step = step
        try:
            yield
        finally:
            self.step = None

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of `inner`, the forward of an attention module, with the step."""
        return inner(*args, **{**kwargs, "cp_step": self.step})


@contextmanager
def windows_told(model: Any) -> Iterator[None]:
    """For the length of the block attention is told the window that its family's code has in masks alone."""
    traits = FAMILIES.get(model.config.model_type)
    with ExitStack() as stack:
        if traits is not None and traits.window_in_mask_alone:
            for layer in decoder_layers(model):
                for attention in attention_modules(layer):
                    told = partial(attention.forward, sliding_window=model.config.sliding_window)
                    stack.enter_context(replaced(attention, "forward", told))
        yield
