"""Cascade attention, of rows that begin alike: over the prefix they share, over what is their own, and merged.

The shared keys are read once for all rows of a run, by as many queries at a time (Hydragen, arXiv:2402.05099, section
3). It costs a second call and a merge, so it is for prefixes that are long enough.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, PlannedAttention
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shared_prefix import SharedPrefix, share_where_it_saves
from cpinfer.ops.states import State, merge_states


@dataclass(frozen=True)
class CascadePlan:
    """Two plans of the same queries, over keys that no query sees in both."""

    shared: PlannedAttention
    own: PlannedAttention

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        plans = (self.shared, self.own)
        return merge_states([plan.run(q, keys, values, scale=scale, soft_cap=soft_cap) for plan in plans])


def plan_cascade(backend: AttentionBackend, rows: AttentionRows, min_saved_keys: int | None) -> PlannedAttention:
    """Plan `rows`, which are not causal, as a cascade where that saves so many keys per query; None never does."""
    return plan_cut(backend, rows, share_where_it_saves(rows, min_saved_keys))


def plan_cut(backend: AttentionBackend, rows: AttentionRows, cut: SharedPrefix | None) -> PlannedAttention:
    """Plan `rows` as they are cut, or whole."""
    return backend.plan(rows) if cut is None else CascadePlan(backend.plan(cut.shared), backend.plan(cut.own))
