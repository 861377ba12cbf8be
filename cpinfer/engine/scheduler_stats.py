"""What a scheduler counts: what happened since it began, and what is under way in its homes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass
class SchedulerStats:
    """What happened, counted: tokens that prefills computed (again after a preemption), found cached, and sampled."""

    num_preemptions: int = 0
    num_computed_prefill_tokens: int = 0
    num_cached_prefill_tokens: int = 0
    num_generated_tokens: int = 0

    def __sub__(self, before: SchedulerStats) -> SchedulerStats:
        """What was counted since `before`."""
        return SchedulerStats(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass
class HomeLoad:
    """What is under way in one home: the samples that are prefilled or run, and the blocks that forks will take."""

    num_active: int = 0
    num_reserved_blocks: int = 0


def sum_stats(parts: Sequence[SchedulerStats]) -> SchedulerStats:
    """The counts of several schedulers together."""
    fields = [astuple(part) for part in parts]
    return SchedulerStats(*map(sum, zip(*fields, strict=True)))
