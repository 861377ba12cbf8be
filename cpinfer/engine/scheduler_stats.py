"""What a scheduler counts: what happened since it began, and what is under way in its homes."""

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


@dataclass
class HomeLoad:
    """What is under way in one home: the samples that are prefilled or run, and the blocks that forks will take."""

    num_active: int = 0
    num_reserved_blocks: int = 0
