"""Native mixed precision: a forward that runs under autocast, around weights of another dtype.

Accelerate puts autocast into the forward of the outermost model. Rollouts run the model inside, so they enter autocast
themselves, and attention gets and caches what a training forward's attention gets.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.steps import AttentionStep
from cpinfer.errors import UserError
from cpinfer.models.checkpoint import first_line


class _DecoderReachedError(Exception):
    """Ends a probe; `dtype` is that of the autocast around it."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype


class _Probe(nn.Module):
    """Stands where the decoder was, and says what it would have run under."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        on = torch.is_autocast_enabled(self._device.type)
        raise _DecoderReachedError(torch.get_autocast_dtype(self._device.type) if on else None)


def autocast_dtype(outermost: Any, model: Any) -> torch.dtype | None:
    """The dtype to which the forward of `outermost` casts, None when it does not; `model` is the causal LM inside.

    Found by running that forward until it reaches the decoder: nothing is computed, no rank is needed. UserError when
    it does not get there.
    """
    prefix, device = model.base_model_prefix, model.get_input_embeddings().weight.device
    decoder = model._modules[prefix]
    model._modules[prefix] = _Probe(device)
    try:
        outermost.forward(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    except _DecoderReachedError as reached:
        return reached.dtype
    except Exception as error:  # of a wrapper that takes other arguments, or has no forward
        raise _no_forward(outermost, model, first_line(error)) from error
    finally:
        model._modules[prefix] = decoder
    raise _no_forward(outermost, model, "it does not call the model's decoder")


def _no_forward(outermost: Any, model: Any, why: str) -> UserError:
    return UserError(
        f"the forward of a {type(outermost).__name__} could not be run on input_ids ({why}), so nobody knows whether "
        f"it runs under autocast. Pass the {type(model).__name__} inside it."
    )


class CastStep:
    """A step whose queries, keys and values come in whatever dtypes autocast left them, and attend in one of them."""

    def __init__(self, step: AttentionStep, dtype: torch.dtype) -> None:
        self._step = step
        self._dtype = dtype
        self.num_tokens = step.num_tokens

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Attention keeps its own precision: states are merged in float32.
        with torch.autocast(q.device.type, enabled=False):
            return self._step.attend(layer.to(self._dtype), q.to(self._dtype), k.to(self._dtype), v.to(self._dtype))
