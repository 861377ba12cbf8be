"""The call every attention backend implements: `plan` once per step on the host, `run` once per layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.states import State


class PlannedAttention(Protocol):
    """Attention over the rows of one plan, ready to run for any layer of the step."""

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        """`out [T, H, V]` in q's dtype and `lse [T, H]`, natural log, float32; a row without keys gives `(0, -inf)`.

        q `[T, H, D]`: the packed queries of all rows. keys `[slots, K, D]`, values `[slots, K, V]`: the paged store
        flattened, last dim contiguous, otherwise of any strides; values may be a view of the first columns of keys. The
        result may lie in memory of the plan: it is valid until this plan runs again.
        """
        ...


class AttentionBackend(Protocol):
    """A family of kernels on one kind of device."""

    name: str

    def plan(self, rows: AttentionRows) -> PlannedAttention:
        """Prepare the rows of one step. Planning again leaves earlier plans valid or says otherwise."""
        ...


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend a config asks for; `auto` is the fastest one that runs on `device`."""
    from cpinfer.backends.torch_backend import TorchBackend

    if name in ("auto", "torch"):
        return TorchBackend(device)
    raise UserError(f'backend "{name}" is unknown; "auto" or "torch" was wanted.')
