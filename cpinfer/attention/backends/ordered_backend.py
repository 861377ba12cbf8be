"""Plans attention in the order that the deterministic mode keeps. It has no row in the registry: the mode takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpinfer.attention.backends.base import PlannedAttention
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.ordered_attention import OrderedAttention
from cpinfer.ops.states import State


class OrderedBackend:
    """For rows whose keys are dealt to N = `num_shards` virtual shards, of whole sequences or of a shard of them.

    `keeps_states`: a plan gives a state for each virtual shard, `out [T, H, N, V]`, `lse [T, H, N]`; others merge them.
    """

    name = "ordered"
    min_saved_keys: int | None = None

    def __init__(self, num_shards: int, interleave: int, *, keeps_states: bool = False) -> None:
        self._num_shards = num_shards
        self._interleave = interleave
        self._keeps_states = keeps_states

    def plan(self, rows: AttentionRows) -> PlannedAttention:
        planned = OrderedAttention(rows, self._num_shards, self._interleave)
        return _States(planned) if self._keeps_states else planned


class _States(NamedTuple):
    planned: OrderedAttention

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        return self.planned.states(q, keys, values, scale=scale, soft_cap=soft_cap)
