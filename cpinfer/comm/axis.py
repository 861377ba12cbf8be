"""A communicator along one axis of the rank grid.

Places along the axis follow the grid's order (for DCP: shard order), whatever order the library underneath gives its
ranks. torch sorts the ranks of a group, so `ProcessGroupComm` permutes what it sends and receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave the same functions these shorter names and deprecates the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class AxisComm(Protocol):
    """Collectives along one axis. Every rank of the axis makes the same calls in the same order, with equal shapes."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int:
        """This rank's place along the axis, in `[0, size)`; on the DCP axis its KV shard."""
        ...

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`[size, *x.shape]`: what each place gave, in place order. `out`, of that shape, may be used to hold it."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """`x [size, ...]` holds one message per place; the result `[size, ...]` what each place had for this one."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """`x [size, ...]` holds one term per place; the result `[...]` is the sum of all terms for this one."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of what all places gave, of the shape of `x`; the same bits on each. `x` may be used to hold it."""
        ...


@dataclass(frozen=True)
class SoloComm:
    """An axis of one rank: every collective is the identity, and no copy."""

    size: int = 1
    index: int = 0

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x.unsqueeze(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[0]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


class ProcessGroupComm:
    """An axis over a torch process group of the same ranks. A peer that ends shows as the library's RuntimeError."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], rank: int) -> None:
        members = dist.get_process_group_ranks(group)
        if sorted(members) != sorted(ranks):
            raise ValueError(f"the group holds ranks {members}, ranks {list(ranks)} were wanted")
        self.group = group
        self.size = len(ranks)
        self.index = list(ranks).index(rank)
        # Where each of our places stands in the group, and the way back; None when they agree and no copy is needed.
        to_group = [members.index(r) for r in ranks]
        ordered = to_group == list(range(self.size))
        self._to_group = None if ordered else _Order(torch.tensor(to_group))
        self._from_group = None if ordered else _Order(torch.argsort(torch.tensor(to_group)))

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = x.new_empty(self.size, *x.shape) if out is None else out
        _all_gather(out.view(-1), x.contiguous().view(-1), group=self.group)
        return _reorder(out, self._to_group)

    def all_to_all(self, x: Tensor) -> Tensor:
        x = _reorder(x, self._from_group).contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        return _reorder(out, self._to_group)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        x = _reorder(x, self._from_group).contiguous()
        out = torch.empty_like(x[0])
        _reduce_scatter(out.view(-1), x.view(-1), group=self.group)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x


class _Order:
    """A permutation of places. It stays on the device where it was last used: to copy it there, in every collective of
    every layer, would stall the stream, and cannot be captured."""

    def __init__(self, order: Tensor) -> None:
        self._order = order

    def of(self, x: Tensor) -> Tensor:
        self._order = self._order.to(x.device)
        return x.index_select(0, self._order)


def _reorder(x: Tensor, order: _Order | None) -> Tensor:
    return x if order is None else order.of(x)


@dataclass
class Traffic:
    """Collectives counted along one axis: how many, and the bytes this rank received from others."""

    num_all_gather: int = 0
    num_all_to_all: int = 0
    num_reduce_scatter: int = 0
    num_all_reduce: int = 0
    received_bytes: int = 0

    @property
    def num_collectives(self) -> int:
        return self.num_all_gather + self.num_all_to_all + self.num_reduce_scatter + self.num_all_reduce


@dataclass
class CountingComm:
    """Counts what another communicator does. Solo axes move nothing, so they count nothing."""

    inner: AxisComm
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def index(self) -> int:
        return self.inner.index

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.size > 1:
            self.traffic.num_all_gather += 1
            self.traffic.received_bytes += (self.size - 1) * x.nbytes
        return self.inner.all_gather(x, out)

    def all_to_all(self, x: Tensor) -> Tensor:
        if self.size > 1:
            self.traffic.num_all_to_all += 1
            self.traffic.received_bytes += (self.size - 1) * x.nbytes // self.size
        return self.inner.all_to_all(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        if self.size > 1:
            self.traffic.num_reduce_scatter += 1
            self.traffic.received_bytes += (self.size - 1) * x.nbytes // self.size
        return self.inner.reduce_scatter(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size > 1:
            self.traffic.num_all_reduce += 1
            # As a reduce-scatter and an all-gather, which is what bandwidth asks for.
            self.traffic.received_bytes += 2 * (self.size - 1) * x.nbytes // self.size
        return self.inner.all_reduce(x)
