"""The KV cache of one rank: one flat store of slots per layer. Which token has which slot is decided in `layout`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.shards import IntArray
from cpinfer.ops.row_copies import copy_rows


class PagedKVCache:
    """Keys and values of all layers, `[num_blocks * block_size, heads, dim]` each.

    It starts as zeros: attention kernels read whole blocks, and what they mask must at least be finite. With
    `has_spare_block` there is one block more, which no table names: tokens at `spare_slot` are written and never read.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_spare_block: bool = False,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.spare_slot = num_blocks * block_size
        slots = self.spare_slot + (block_size if has_spare_block else 0)

        def zeros(dim: int) -> list[Tensor]:
            return [torch.zeros(slots, layout.num_heads, dim, dtype=dtype, device=device) for _ in range(num_layers)]

        self._keys = zeros(layout.k_dim)
        self._values = (
            [keys[..., : layout.v_dim] for keys in self._keys] if layout.v_is_prefix_of_k else zeros(layout.v_dim)
        )

    def index(self, array: IntArray) -> Tensor:
        """Row numbers that a plan has made, where the cache can use them."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole store of a layer, keys and values, without a copy; block tables say what is whose."""
        return self._keys[layer], self._values[layer]

    def write(
        self,
        layer: int,
        slots: Tensor,
        parts: Sequence[Tensor],
        rows: Tensor | None = None,
        heads: slice = slice(None),
    ) -> None:
        """Store `parts` at `slots [W]`, which are distinct: k `[W, heads, k_dim]`, and v where it is not part of k.

        Or of longer parts the `rows [W]`; or of all stored heads these alone.
        """
        stores = (self._keys[layer][:, heads], self._values[layer][:, heads])
        copy_rows(list(zip(parts, stores, strict=False)), rows, slots)

    def parts(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What of k and v has to be sent and stored: both, or k alone where v is part of it."""
        return (k,) if self.layout.v_is_prefix_of_k else (k, v)

    def views(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[..., k_dim]` and values `[..., v_dim]` of rows that hold the parts side by side, without a copy."""
        layout = self.layout
        if layout.v_is_prefix_of_k:
            return rows, rows[..., : layout.v_dim]
        return rows[..., : layout.k_dim], rows[..., layout.k_dim :]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers, from the first to the second of each pair; no block is both."""
        if not pairs:
            return
        index = torch.tensor(pairs, device=self.device)
        src, dst = (
            (blocks[:, None] * self.block_size + torch.arange(self.block_size, device=self.device)).flatten()
            for blocks in index.unbind(dim=1)
        )
        for layer in range(len(self._keys)):
            self.write(layer, dst, self.parts(*self.read(layer)), src)

    def new_rows(self, n: int, num_heads: int) -> Tensor:
        """Zeros `[n, num_heads, width]`: room for the parts of n tokens, side by side, as they travel."""
        return torch.zeros(n, num_heads, self.layout.width, dtype=self.dtype, device=self.device)
