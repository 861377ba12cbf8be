"""The decoder layers of a model, whatever its family calls them, and the attention in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from cpinfer.errors import UserError

_PROJECTIONS = frozenset(
    ("q_proj", "q_b_proj", "k_proj", "kv_a_proj_with_mqa", "c_attn", "qkv_proj", "in_proj_qkvz", "in_proj_qkv")
)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers in order. ValueError for a model that keeps them in no list of their own."""
    num_layers = model.config.num_hidden_layers
    for module in model.modules():  # from the outside in
        if isinstance(module, nn.ModuleList) and len(module) >= num_layers > 0:
            layers = list(module)[:num_layers]  # a model runs no more than its config says
            if all(any(True for _ in attention_modules(layer)) for layer in layers):
                return layers
    raise UserError(
        f"{type(model).__name__} has no list of {num_layers} decoder layers with attention, which its config says it "
        "has. Set num_hidden_layers to the number of its layers, and attach to the causal LM itself."
    )


def attention_modules(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules in a layer that attend: several where an adapter keeps copies, of which one is in use."""
    yield from filter(is_attention, layer.modules())


def is_attention(module: nn.Module) -> bool:
    """Whether a module has a place in the order of layers, and projections of its own."""
    return "layer_idx" in vars(module) and not _PROJECTIONS.isdisjoint(module._modules)


def check_layers(model: Any, windows: Sequence[int | None]) -> None:
    """UserError when a layer's attention counts itself as another layer, or sees another window than its config says.

    The one would use another layer's place in the cache; of the other Transformers' own answers depend on which
    attention runs. `windows` as `ModelSpec.windows` has them.
    """
    names = {module: name for name, module in model.named_modules()}
    for index, layer in enumerate(decoder_layers(model)):
        for attention in attention_modules(layer):
            if attention.layer_idx != index:
                raise UserError(
                    f"{names[attention]} runs as layer {index} and has layer_idx {attention.layer_idx}; each layer "
                    "needs a module and a place in the cache of its own. Copy layers that are used twice (deepcopy, or "
                    "LoRA's layer_replication), and give their attention the layer_idx at which they stand."
                )
            # Some keep the config's window on layers that do not use it, beside a word of which these are.
            used = vars(attention).get("is_sliding", True)
            window = vars(attention).get("sliding_window", windows[index]) if used else None
            if window != windows[index]:
                raise UserError(
                    f"{names[attention]} was made with sliding_window {window}; the model's config says "
                    f"{windows[index]} for layer {index}. Make the model from the config that it is to have."
                )
