"""The attention backends that there are. A new one is a file or a folder beside this one, and a row here.

    make_backend("auto", device, needs)      the first row that is made for the device and can do what is needed

A row names a module, which is imported when the backend is first asked for, so that nobody needs the libraries of
backends that they do not use. The module has the functions of `BackendModule`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch

from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds
from cpinfer.errors import UserError, unknown_word


class BackendModule(Protocol):
    """What the module of a row has."""

    def unfit(self, device: torch.device, needs: AttentionNeeds) -> UserError | None:
        """Why the backend cannot do what is `needed` on `device`; None when it can. Runs nothing there."""
        ...

    def device_bytes(self, device: torch.device, needs: AttentionNeeds) -> int:
        """What it keeps on the device at most, beside what it is given."""
        ...

    def make(self, device: torch.device, needs: AttentionNeeds) -> AttentionBackend:
        """The backend, checked where it is not ours. BackendFaultError when it is there and wrong."""
        ...


@dataclass(frozen=True)
class BackendRow:
    """One backend. `device_types` and `dtypes` are those that `auto` takes it for; None is all."""

    module: str
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None

    @property
    def code(self) -> BackendModule:
        return cast("BackendModule", import_module(self.module))

    def is_made_for(self, device: torch.device, dtype: torch.dtype) -> bool:
        is_for_device = self.device_types is None or device.type in self.device_types
        return is_for_device and (self.dtypes is None or dtype in self.dtypes)


# In the order in which `auto` asks them: the fastest first, and last the one that can always.
BACKENDS: Mapping[str, BackendRow] = {
    "flashinfer": BackendRow("cpinfer.attention.backends.flashinfer.backend", frozenset({"cuda"})),
    # In half precision it is nearer to attention than torch's kernel is, and so further from the training forward.
    "cpu": BackendRow("cpinfer.attention.backends.cpu_backend", frozenset({"cpu"}), frozenset({torch.float32})),
    "torch": BackendRow("cpinfer.attention.backends.torch_backend"),
}


def check_choice(
    name: str, device: torch.device, needs: AttentionNeeds, backends: Mapping[str, BackendRow] = BACKENDS
) -> None:
    """UserError when the backend asked for by name cannot run `needs` on `device`; `auto` can always."""
    if name == "auto":
        return
    if name not in backends:
        raise UserError(unknown_word("backend", name, ["auto", *backends]))
    error = backends[name].code.unfit(device, needs)
    if error is not None:
        raise error


def make_backend(
    name: str, device: torch.device, needs: AttentionNeeds, backends: Mapping[str, BackendRow] = BACKENDS
) -> AttentionBackend:
    """The backend a config asks for; `auto` is the first row that is made for `device` and can run `needs`.

    Errors as `check_choice` has them; BackendFaultError when a library is there and wrong. When `auto` has to pass over
    a backend that is made for the device, it says why.
    """
    chosen, passed_over = _choice(name, device, needs, backends)
    if passed_over:
        why = " ".join(map(str, passed_over))
        warnings.warn(f"attention runs on {chosen}, which is slower on {device.type.upper()}: {why}", stacklevel=2)
    return backends[chosen].code.make(device, needs)


def backend_bytes(
    name: str, device: torch.device, needs: AttentionNeeds, backends: Mapping[str, BackendRow] = BACKENDS
) -> int:
    """What the backend that `make_backend` would make keeps on `device`, at most. Errors as `check_choice` has them."""
    chosen, _ = _choice(name, device, needs, backends)
    return backends[chosen].code.device_bytes(device, needs)


def _choice(
    name: str, device: torch.device, needs: AttentionNeeds, backends: Mapping[str, BackendRow]
) -> tuple[str, list[UserError]]:
    """The name of a row, and why those before it that are made for the device were passed over."""
    check_choice(name, device, needs, backends)
    if name != "auto":
        return name, []
    passed_over: list[UserError] = []
    for other, row in backends.items():
        if row.is_made_for(device, needs.dtype):
            error = row.code.unfit(device, needs)
            if error is None:
                return other, passed_over
            passed_over.append(error)
    raise UserError(" ".join(["no backend can do what is needed:", *map(str, passed_over)]))
