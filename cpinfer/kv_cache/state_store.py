"""States of sequences on one rank: of every layer of linear attention a state, and the last inputs before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpinfer.kv_cache.paged_kv_cache import zeroed
from cpinfer.layout.capacity import StateLayout


class StateStore:
    """`num_slots` of the states `[H, K, V]` of `layers`, in float32, and inputs `[W - 1, C]` in the model's dtype.

    Which sequence has which slot is decided elsewhere. A slot holds what its last sequence left, until it is written:
    who begins a sequence begins with zeros of its own.
    """

    def __init__(
        self, layout: StateLayout, layers: Sequence[int], num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = device
        state = (num_slots, layout.num_v_heads, layout.k_dim, layout.v_dim)
        inputs = (num_slots, layout.num_tail, layout.num_channels)
        self._states = {layer: zeroed(state, torch.float32, device) for layer in layers}
        self._inputs = {layer: zeroed(inputs, dtype, device) for layer in layers}

    def index(self, slots: Sequence[int]) -> Tensor:
        """Slot numbers where the store can use them."""
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def states(self, layer: int, slots: Tensor) -> Tensor:
        """`[slots, H, K, V]`, a copy."""
        return self._states[layer][slots]

    def inputs(self, layer: int, slots: Tensor) -> Tensor:
        """`[slots, W - 1, C]`, a copy."""
        return self._inputs[layer][slots]

    def write_states(self, layer: int, slots: Tensor, states: Tensor) -> None:
        """Keep `states [slots, H, K, V]`, or one `[H, K, V]` in all `slots`."""
        self._states[layer][slots] = states.float()

    def write_inputs(self, layer: int, slots: Tensor, inputs: Tensor) -> None:
        """Keep `inputs [slots, W - 1, C]`, or those of one in all `slots`."""
        self._inputs[layer][slots] = inputs.to(self.dtype)
