"""Hooks on a model's modules that are a trainer's business, and are no business of a rollout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def hooks_disabled(model: nn.Module, owner: str, *, inside: bool = True) -> Iterator[None]:
    """For the length of the block no forward hook runs that the package `owner` has put on a module of `model`.

    Without `inside` that is on `model` alone. Hooks of others run as ever. Afterwards every module has the hooks it
    had, the same objects in the same order, so handles that somebody keeps remain good.
    """
    with ExitStack() as stack:
        for module in model.modules() if inside else (model,):
            for name in _FORWARD_HOOKS:
                hooks: OrderedDict[int, Callable[..., Any]] = getattr(module, name)
                others = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of(hook, owner))
                if len(others) < len(hooks):
                    setattr(module, name, others)
                    stack.callback(setattr, module, name, hooks)
        yield


def _is_of(hook: Callable[..., Any], owner: str) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    home = getattr(function, "__module__", None) or ""
    return home == owner or home.startswith(owner + ".")
