"""Routers see real tokens only.

A rank without tokens runs a dummy row, and decode pads the ranks that are short of a row, because models crash on zero
rows and every collective needs every rank. A mixture of experts must not count such rows: not in statistics that hooks
take of its router, nor in the work of its experts. So its blocks are given the real rows alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ROUTERS = frozenset(("gate", "router"))


def is_moe_block(module: Any) -> bool:
    """Whether the parts of one are the module's own: wrappers answer for what they wrap, which is met on its own."""
    return "experts" in module._modules and not _ROUTERS.isdisjoint(module._modules)


class UnpaddedMoE:
    """The forward of a mixture of experts, for the first `count` rows; those behind it get zeros.

    One is made for each engine and set before each step.
    """

    def __init__(self) -> None:
        self.count = 0

    def forward(self, inner: Any, hidden_states: Tensor, *, returns_scores: bool = False) -> Any:
        """`[1, T, hidden]` to the same, by `inner`, the forward of a block.

        One that `returns_scores` gives those of its router as well, for the trainer's losses; they are of real rows.
        """
        if self.count == hidden_states.shape[1]:
            return inner(hidden_states)
        out = hidden_states.new_zeros(hidden_states.shape)
        if self.count == 0:
            return (out, None) if returns_scores else out
        found = inner(hidden_states[:, : self.count])
        out[:, : self.count] = found[0] if returns_scores else found
        return (out, found[1]) if returns_scores else out
