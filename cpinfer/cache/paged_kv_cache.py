"""The KV cache of one rank: one flat store of slots per layer. Which token has which slot is decided in `layout`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpinfer.layout.capacity import KVLayout


class PagedKVCache:
    """Keys and values of all layers, `[num_blocks * block_size, heads, dim]` each.

    It starts as zeros: attention kernels read whole blocks, and what they mask must at least be finite.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        slots = num_blocks * block_size

        def zeros(dim: int) -> list[Tensor]:
            return [torch.zeros(slots, layout.num_heads, dim, dtype=dtype, device=device) for _ in range(num_layers)]

        self._keys = zeros(layout.k_dim)
        self._values = (
            [keys[..., : layout.v_dim] for keys in self._keys] if layout.v_is_prefix_of_k else zeros(layout.v_dim)
        )

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole store of a layer, keys and values, without a copy; block tables say what is whose."""
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k [W, heads, k_dim]`, `v [W, heads, v_dim]` at `slots [W]`, which are distinct. W may be 0."""
        self._keys[layer].index_copy_(0, slots, k)
        if not self.layout.v_is_prefix_of_k:
            self._values[layer].index_copy_(0, slots, v)

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
            keys, values = self.read(layer)
            self.write(layer, dst, keys.index_select(0, src), values.index_select(0, src))

    def new_rows(self, n: int) -> Tensor:
        """Zeros `[n, heads, k_dim + v_dim]`: room for k and v of n tokens, side by side, as they travel."""
        width = self.layout.k_dim + self.layout.v_dim
        return torch.zeros(n, self.layout.num_heads, width, dtype=self.dtype, device=self.device)
