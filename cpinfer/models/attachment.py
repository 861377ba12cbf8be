"""What is changed in a model's modules while an engine is attached, and the check that nobody else changes more.

Every change is an attribute of one instance that gets another value; on the way out it has the object it had.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from cpinfer.errors import ModelChangedError, UserError
from cpinfer.models.local_weights import WeightKind, weight_kind

_MARK = "_cpinfer_attached"


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one instance; afterwards it has the one it had, or none of its own."""
    own = module.__dict__
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


@contextmanager
def exchanged(model: Any, found: object, other: object) -> Iterator[None]:
    """Every module of `model` that holds the object `found` as an attribute holds `other` in its place."""
    with ExitStack() as stack:
        for module, name in places_of(model, found):
            stack.enter_context(replaced(module, name, other))
        yield


def places_of(model: Any, found: object) -> list[tuple[Any, str]]:
    """Modules of `model` that hold the object `found`, and by which attribute."""
    return [(module, name) for module in model.modules() for name, value in vars(module).items() if value is found]


@contextmanager
def claimed(model: Any) -> Iterator[None]:
    """No other engine may have a module of `model` for the length of the block: UserError when one has it already."""
    for name, module in model.named_modules():
        if _MARK in vars(module):
            raise UserError(
                f"{name or type(module).__name__} is attached to an engine already, or was copied inside the block of "
                "one; a model serves one engine at a time. Leave the first `with cpinfer.attach(...)` block before."
            )
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(replaced(module, _MARK, True))
        yield


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """What `torch.compile` made of modules of `model` rests for the length of the block: they run as they are written.

    A compiled module would be compiled anew for every number of tokens, and the engine's exchanges with it.
    """
    with ExitStack() as stack:
        for module in model.modules():
            own = vars(module)
            if own.get("_compiled_call_impl") is not None:  # `module.compile()`
                stack.enter_context(replaced(module, "_compiled_call_impl", None))
            plain = getattr(own.get("forward"), "_torchdynamo_orig_callable", None)
            if plain is not None:  # `torch.compile(module)`, or of its forward
                stack.enter_context(replaced(module, "forward", plain))
        yield


@contextmanager
def attending_by(model: Any, implementation: str, *, gathered_by_fsdp: bool = False) -> Iterator[Attachment]:
    """Every module of `model` that holds a config attends by `implementation`, whichever config object it holds.

    Transformers asks the attention module's own config. Each config object gets a copy for the block: other models, a
    frozen reference say, may have been made from the same object.
    """
    copies: dict[int, Any] = {}
    places = []
    with ExitStack() as stack:
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if not isinstance(value, PretrainedConfig):
                    continue
                if id(value) not in copies:
                    copies[id(value)] = copy.copy(value)
                    copies[id(value)]._attn_implementation = implementation
                stack.enter_context(replaced(module, name, copies[id(value)]))
                places.append((module, name, copies[id(value)]))
        parts = tuple(Part.of(name, module, gathered_by_fsdp) for name, module in model.named_modules())
        yield Attachment(model, implementation, tuple(places), parts, gathered_by_fsdp)


@dataclass(frozen=True)
class Part:
    """One module of an attached model: what is in it, its mode, and what its own weights are."""

    name: str
    module: Any
    children: tuple[Any, ...]
    training: bool
    weights: Mapping[str, WeightKind]

    @classmethod
    def of(cls, name: str, module: Any, gathered_by_fsdp: bool) -> Part:
        """The module as it is now."""
        kinds = {
            key: weight_kind(weight, gathered_by_fsdp=gathered_by_fsdp)
            for key, weight in module._parameters.items()
            if weight is not None
        }
        told = {key: kind for key, kind in kinds.items() if kind is not None}
        return cls(name, module, tuple(module._modules.values()), module.training, told)

    def change(self, gathered_by_fsdp: bool) -> str | None:
        """What is no longer as it was, in words."""
        module, name = self.module, self.name or type(self.module).__name__
        if tuple(module._modules.values()) != self.children:
            return f"modules in {name} were added, replaced or removed"
        if module.training != self.training:
            return f"{name} was put into training mode"
        for key, before in self.weights.items():
            weight = module._parameters.get(key)
            kind = None if weight is None else weight_kind(weight, gathered_by_fsdp=gathered_by_fsdp)
            if kind is not None and kind != before:
                return f"{name}.{key} was {_words(before)} and became {_words(kind)}"
        return None


@dataclass(frozen=True)
class Attachment:
    """What an attached model is made of. `places`: modules, and the attribute and config by which they attend."""

    model: Any
    implementation: str
    places: tuple[tuple[Any, str, Any], ...]
    parts: tuple[Part, ...]
    gathered_by_fsdp: bool

    def check(self) -> None:
        """ModelChangedError when the model has become another inside the block."""
        change = next(self._changes(), None)
        if change is not None:
            raise ModelChangedError(
                f"{change} while the model was attached. Leave the `with cpinfer.attach(...)` block, change the model, "
                "and attach again."
            )

    def _changes(self) -> Iterator[str]:
        for part in self.parts:  # not by walking through the tree again, which takes five times as long
            change = part.change(self.gathered_by_fsdp)
            if change is not None:
                yield change
        for module, name, config in self.places:
            if vars(module).get(name) is not config or config._attn_implementation != self.implementation:
                yield f"the config or the attention implementation of a {type(module).__name__} was replaced"


def _words(kind: WeightKind) -> str:
    dtype, device = kind
    return str(dtype) if device is None else f"{dtype} on {device}"
