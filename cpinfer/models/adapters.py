"""Adapters (PEFT) on a model: which are in effect, and which cannot be.

An adapter that sits in the modules it changes is in effect in our forwards as in any other. Known by what its objects
have, so that nothing of PEFT is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cpinfer.refusals import refuse

# Kinds that change the weights or outputs of single modules, whatever the forward of the PeftModel does. Prompts,
# mixtures by input (X-LoRA, Poly) and networks beside the model are others.
_IN_MODULES = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "VERA", "LN_TUNING", "TRAINABLE_TOKENS")

AdapterState = tuple[tuple[Any, ...], ...]


def refuse_adapters_outside_modules(adapters: Mapping[str, Any]) -> None:
    """UnsupportedError for adapters, configs by name, that do not act in the modules they change."""
    for name, adapter in adapters.items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind not in _IN_MODULES:
            raise refuse("adapter_outside_modules", f'adapter "{name}" is of kind {kind}')
        if getattr(adapter, "alora_invocation_tokens", None) is not None:
            raise refuse("adapter_outside_modules", f'adapter "{name}" has alora_invocation_tokens')


def adapter_state(model: Any) -> AdapterState:
    """Which adapters are in effect in every module that has any; the same until one is switched, merged or scaled."""
    return tuple(
        (
            name,
            tuple(_as_list(module.active_adapter)),
            bool(module.disable_adapters),
            tuple(getattr(module, "merged_adapters", ())),
            # Of its own: where whole modules are saved, the wrapper answers with what they have under this name.
            tuple(sorted((key, float(value)) for key, value in vars(module).get("scaling", {}).items())),
        )
        for name, module in _adapted_modules(model)
    )


def refuse_adapters_under_tp(model: Any) -> None:
    """UnsupportedError when a module has adapters."""
    for name, module in _adapted_modules(model):
        raise refuse("adapter_tp", f"{name} is a {type(module).__name__}")


def _adapted_modules(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        # An adapter keeps what it stands for under one of these names.
        if not module._modules.keys().isdisjoint(("base_layer", "original_module")) and hasattr(
            module, "disable_adapters"
        ):
            yield name, module


def _as_list(names: str | list[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)
