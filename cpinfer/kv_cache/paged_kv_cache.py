"""The KV cache of one rank: one flat store of slots per layer. Which token has which slot is decided in `layout`."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.shards import IntArray
from cpinfer.ops.float8 import rounded_through
from cpinfer.ops.row_copies import copy_rows
from cpinfer.ops.staging import Staging
from cpinfer.ops.states import State


class PagedKVCache:
    """Keys and values of all layers, `[num_blocks * block_size, heads, dim]` each.

    It starts as zeros: attention kernels read whole blocks, and what they mask must at least be finite. On CPU a page
    of it takes memory, and time to be zeroed, when it is first touched: a phase pays for the blocks that it uses. With
    `has_padding_block` one block more, which no table names: padding rows write to `padding_slot`, and nobody reads it.

    `dtype` is the model's, in which K and V are computed and travel. In `store_dtype` they are kept; where it is
    smaller, K and V are rounded through it when they are made (`rounded`), before anyone reads them:

        k, v -- rounded --> what everyone attends to, and sends: numbers of the store, in the model's dtype
               -- write --> the same numbers, in the store's

    So what a token's K and V are does not depend on who reads them from where, nor on when.
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
        has_padding_block: bool = False,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.store_dtype = store_dtype or dtype
        self.device = device
        self.staging = Staging(device)
        self.padding_slot = num_blocks * block_size
        slots = self.padding_slot + (block_size if has_padding_block else 0)

        def zeros(dim: int) -> list[Tensor]:
            shape = (slots, layout.num_heads, dim)
            return [zeroed(shape, self.store_dtype, device) for _ in range(num_layers)]

        self._keys = zeros(layout.k_dim)
        self._values = (
            [keys[..., : layout.v_dim] for keys in self._keys] if layout.v_is_prefix_of_k else zeros(layout.v_dim)
        )

        # 0, or NaN since something was written that is not finite.
        self._fault = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def rounds(self) -> bool:
        """Whether K and V are stored in fewer bits than they are computed in."""
        return self.store_dtype != self.dtype

    def rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of new tokens as the store will give them back, in the model's dtype; as they are where it keeps all.

        Of latents `[T, 1, k_dim]` k is the whole row, and v stays the first columns of it.
        """
        if not self.rounds:
            return k, v
        k = rounded_through(k, self.store_dtype)
        if self.layout.v_is_prefix_of_k:
            return k, k[..., : self.layout.v_dim]
        return k, rounded_through(v, self.store_dtype)

    def with_faults(self, state: State) -> State:
        """A state of attention over the store: NaN once anything was stored that is not finite.

        FlashInfer widens fp8 by shifting bits (`fast_dequant_f8f16x4`), which makes the NaN of e4m3 480: a fault would
        pass for a large key.
        """
        if not self.rounds:
            return state
        out, lse = state
        return out + self._fault.to(out.dtype), lse

    def forget_faults(self) -> None:
        """What comes is computed with other weights, and nothing of what is stored will be read."""
        self._fault.zero_()

    def clear(self, num_blocks: int | None = None) -> None:
        """Zeros in all blocks, or the first so many. After a fault some hold NaN; they are given out and read whole."""
        for layer in range(len(self._keys)):
            for store in self.parts(*self.read(layer)):
                store[: None if num_blocks is None else num_blocks * self.block_size].zero_()
        self.forget_faults()

    def index(self, array: IntArray) -> Tensor:
        """Row numbers that a plan has made, where the cache can use them."""
        return self.staging.put(array)

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

        Or of longer parts the `rows [W]`; or of all stored heads these alone. They are in the model's dtype, `rounded`.
        """
        if self.rounds and rows is not None:  # of others' faults this store knows nothing
            parts, rows = [part.index_select(0, rows) for part in parts], None
        stores = (self._keys[layer][:, heads], self._values[layer][:, heads])
        copy_rows(list(zip(parts, stores, strict=False)), rows, slots)
        if self.rounds:
            for part in parts:
                self._fault += (part - part).sum(dtype=torch.float32)

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
            copy_rows([(store, store) for store in self.parts(*self.read(layer))], src, dst)

    def new_rows(self, n: int, num_heads: int) -> Tensor:
        """Zeros `[n, num_heads, width]`: room for the parts of n tokens, side by side, as they travel."""
        return torch.zeros(n, num_heads, self.layout.width, dtype=self.dtype, device=self.device)


def zeroed(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost nothing until they are touched, where the device can do that.

    On CPU `torch.zeros` writes them all, which for a pool of 256 MiB takes longer than a short rollout, and so does an
    allocator that has as much memory left over. Pages of a mapping are zeroed by the system when they are touched.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    # They begin at a page, at 64 bytes as torch's own tensors do: elsewhere kernels may sum in another order.
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of systems without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    store = np.frombuffer(pages, dtype=np.uint8, count=num_bytes)
    return torch.from_numpy(store).view(dtype).view(*shape)
