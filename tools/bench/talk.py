"""What the ranks of a benchmark tell each other, beside what the measured code does."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class Talk:
    """The default process group, or nobody where there is one process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self._world_size = world_size

    def barrier(self) -> None:
        if self._world_size > 1:
            dist.barrier()

    def all(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order."""
        values = [value] * self._world_size
        if self._world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Rank 0's `value`."""
        return self.all(value)[0]
