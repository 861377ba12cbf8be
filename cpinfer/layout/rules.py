"""Every rule on layouts in one place."""

from __future__ import annotations

from dataclasses import dataclass

from cpinfer.layout.grid import grid_errors
from cpinfer.layout.heads import head_errors


@dataclass(frozen=True)
class LayoutSizes:
    """The numbers a layout is made of, not yet known to fit together."""

    tp_size: int
    pcp_size: int
    dcp_size: int
    num_q_heads: int
    num_kv_heads: int
    dp_size: int = 1
    interleave: int = 16
    block_size: int = 16

    def __str__(self) -> str:
        return f"tp={self.tp_size} pcp={self.pcp_size} dcp={self.dcp_size}"


def layout_errors(sizes: LayoutSizes) -> list[str]:
    """Sentences that say why a layout cannot be used; empty when it can."""
    errors = grid_errors(sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)
    if sizes.tp_size >= 1:
        errors += head_errors(sizes.num_q_heads, sizes.num_kv_heads, sizes.tp_size)
    errors += [
        f"{name}={value} must be at least 1."
        for name, value in (("interleave", sizes.interleave), ("block_size", sizes.block_size))
        if value < 1
    ]
    return errors
