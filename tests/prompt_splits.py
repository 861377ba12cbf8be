"""Short prompts that are split over pcp ranks: engines would deal them to ranks whole, and show nothing of a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from cpinfer.engine import step_plans

# As of a machine on which a rank's linear layers wait for no weights: of 12 new tokens on pays a split, of 9 behind a
# context; prompts of fewer are dealt whole still.
FAST = partial(step_plans.StepCost, floor_tokens=8, row_tokens=1)


@contextmanager
def short_prompts_split() -> Iterator[list[int]]:
    """Inside, engines are made that split short prompts. Yields how many each step has split, on every rank."""
    counts: list[int] = []
    assign = step_plans.assign_prompts

    def counted(lens: Sequence[int], *rest: Any) -> list[int | None]:
        assigned = assign(lens, *rest)
        counts.append(assigned.count(None))
        return assigned

    with patch.object(step_plans, "StepCost", FAST), patch.object(step_plans, "assign_prompts", counted):
        yield counts
