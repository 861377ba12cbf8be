"""Every rule on layouts in one place: what is illegal, and what is legal but not built yet."""

from __future__ import annotations

from dataclasses import dataclass

from cpinfer.layout.grid import RankGrid, grid_errors
from cpinfer.layout.heads import HeadPlacement, head_errors
from cpinfer.refusals import refuse


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
    """Sentences that say why a layout cannot be used; empty when it can.

    Groups that mix KV heads are refused by everyone, since nothing may ever run with silently wrong heads.
    """
    errors = grid_errors(sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)
    if sizes.tp_size >= 1:
        errors += head_errors(sizes.num_q_heads, sizes.num_kv_heads, sizes.tp_size)
    errors += [
        f"{name}={value} must be at least 1."
        for name, value in (("interleave", sizes.interleave), ("block_size", sizes.block_size))
        if value < 1
    ]
    if errors:
        return errors
    grid = RankGrid(sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)
    heads = HeadPlacement(sizes.num_q_heads, sizes.num_kv_heads, sizes.tp_size)
    if heads.mixes_heads(grid):
        k = grid.columns_per_dcp_group
        found = (
            f"{sizes}: a DCP group spans {k} tp ranks, but each of the {sizes.num_kv_heads} KV heads is on {heads.rep}"
        )
        errors.append(str(refuse("mixed_heads", found)) + _unmixed_advice(grid, heads))
    return errors


def _unmixed_advice(grid: RankGrid, heads: HeadPlacement) -> str:
    columns = max(k for k in range(1, heads.rep + 1) if heads.rep % k == 0 and grid.tp_size % k == 0)
    return f" The largest here is dcp={grid.pcp_size * columns}."
