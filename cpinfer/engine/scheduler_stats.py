"""What a scheduler counts: what happened since it began."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add, sub


@dataclass
class SchedulerStats:
    """What happened, counted: tokens that prefills computed (again after a preemption), found cached, and sampled."""

    num_preemptions: int = 0
    num_computed_prefill_tokens: int = 0
    num_cached_prefill_tokens: int = 0
    num_generated_tokens: int = 0

    def __sub__(self, before: SchedulerStats) -> SchedulerStats:
        """What was counted since `before`."""
        return SchedulerStats(*map(sub, astuple(self), astuple(before)))

    def __add__(self, other: SchedulerStats) -> SchedulerStats:
        """The counts of two schedulers together."""
        return SchedulerStats(*map(add, astuple(self), astuple(other)))
