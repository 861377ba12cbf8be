"""The call every attention backend implements: `plan` once per step on the host, `run` once per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.states import State


class PlannedAttention(Protocol):
    """Attention over the rows of one plan, ready to run for any layer of the step."""

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        """`out [T, H, V]` in q's dtype and `lse [T, H]`, natural log, float32; a row without keys gives `(0, -inf)`.

        q `[T, H, D]`: the packed queries of all rows. keys `[slots, K, D]`, values `[slots, K, V]`: the paged store
        flattened, in q's dtype or the cache's, last dim contiguous, otherwise of any strides; values may be a view of
        the first columns of keys. The result may lie in memory of the plan: it is valid until this plan runs again.
        """
        ...


class AttentionBackend(Protocol):
    """A family of kernels on one kind of device.

    `min_saved_keys`: keys per query that attending to a shared prefix once has to save, to be faster; None: not known.
    """

    name: str
    min_saved_keys: int | None

    def plan(self, rows: AttentionRows) -> PlannedAttention:
        """Prepare the rows of one step. Planning again leaves earlier plans valid or says otherwise."""
        ...


class StepBackends(NamedTuple):
    """The kernels of both kinds of steps: as a rule the same."""

    prefill: AttentionBackend
    decode: AttentionBackend


class FixedSize(NamedTuple):
    """The most rows and pages of plans that are replayed: their arrays keep their place in memory."""

    num_rows: int
    num_pages: int


class ReplannedAttention(PlannedAttention, Protocol):
    """A plan that takes other rows and leaves everything where it is, so that what was captured of it stays valid."""

    def update(self, rows: AttentionRows) -> None:
        """Plan `rows` instead, as many as its size says. Before the first time there is nothing to run."""
        ...


@runtime_checkable
class FixedSizeBackend(AttentionBackend, Protocol):
    """A backend whose kernels can be captured in a CUDA graph and replayed with other rows."""

    def fixed_plan(self, size: FixedSize, *, single_tokens: bool) -> ReplannedAttention:
        """A plan without rows yet. `single_tokens`: of rows that may begin anywhere in a block, as windows' do."""
        ...


class LayerKind(NamedTuple):
    """What kernels may be compiled for beside heads and dtypes.

    `has_window`: the layer sees the last so many tokens only. `has_cap`: its logits have a soft cap.
    """

    has_window: bool = False
    has_cap: bool = False


@dataclass(frozen=True)
class AttentionNeeds:
    """What a rank will ask of its backend: the dtype, and for each kind of call its query heads and KV layout.

    GQA has the heads of a rank and those of its DCP group; latent attention the layout of its cache, and the expanded
    one of prefill. `cache_dtype`: that of cached keys and values where it is not `dtype`. `layers`: the kinds of layers
    that the model has, each once. `replayed`: sizes of the plans that are replayed, as each kind of layer has them.
    """

    dtype: torch.dtype
    calls: tuple[tuple[int, KVLayout], ...]
    cache_dtype: torch.dtype | None = None
    layers: tuple[LayerKind, ...] = (LayerKind(),)
    replayed: tuple[FixedSize, ...] = ()

    def key_dtypes(self, layout: KVLayout) -> tuple[torch.dtype, ...]:
        """What keys of this layout come in: new tokens in `dtype`, cached ones in the cache's.

        Latents are attended to in the cache alone, and what they are expanded to is never cached.
        """
        if self.cache_dtype in (None, self.dtype):
            return (self.dtype,)
        if layout.v_is_prefix_of_k:
            return (self.cache_dtype,)
        is_expanded = any(other.v_is_prefix_of_k for _, other in self.calls)
        return (self.dtype,) if is_expanded else (self.dtype, self.cache_dtype)
