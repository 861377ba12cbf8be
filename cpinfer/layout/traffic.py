"""What one attention layer costs on the network, in bytes that a rank receives from others.

The formulas are those of the design (sections 4 and 5); they count payload, padding of the longest rank included, and
no protocol. Tests hold the engine's counted bytes against them.

    R  decode rows per rank      hq  query heads of a rank      kv  what it computes of K and V      b  bytes per value

>>> kv = KVLayout(num_heads=1, k_dim=128, v_dim=128)
>>> decode_bytes(dcp_size=2, rows_per_rank=3, q_heads=4, kv=kv, dtype_bytes=2, sends_new_kv=True)
DecodeBytes(gather=4608, all_to_all=3120)
>>> prefill_bytes(num_places=2, part_len=13, kv=kv, dtype_bytes=2)
6656
"""

from __future__ import annotations

from typing import NamedTuple

from cpinfer.layout.capacity import STATE_BYTES, KVLayout, StateLayout
from cpinfer.layout.states import StatePlan

LSE_BYTES = 4  # Always float32: an lse in bfloat16 costs 1.3e-2 rms over 8 shards.


class DecodeBytes(NamedTuple):
    """Bytes one rank receives per layer of a decode step, by collective."""

    gather: int
    all_to_all: int

    @property
    def total(self) -> int:
        return self.gather + self.all_to_all


def decode_collectives(dcp_size: int) -> int:
    """Collectives of attention per layer of a decode step, whatever the pcp size: gather and all-to-all, or none."""
    return 0 if dcp_size == 1 else 2


def decode_bytes(
    dcp_size: int,
    rows_per_rank: int,
    q_heads: int,
    kv: KVLayout,
    dtype_bytes: int,
    sends_new_kv: bool,
    wire_bytes: int | None = None,
) -> DecodeBytes:
    """What a decode step costs; nothing at `dcp_size` 1.

    The gather brings the new q of every other rank of the DCP group, `(dcp-1) * R * hq * k_dim * b`, packed with their
    new k and v unless all owners have those already: `sends_new_kv` is whether pcp deals rows or heads are mixed. The
    all-to-all brings a partial output and its lse back from each: `(dcp-1) * R * hq * (v_dim * b + 4)`. `kv` counts the
    heads that one rank computes; `wire_bytes` are the bytes per value in which outputs travel, `dtype_bytes` when None.
    """
    peers = dcp_size - 1
    sent_values = q_heads * kv.k_dim + (kv.values_per_token if sends_new_kv else 0)
    out_bytes = kv.v_dim * (dtype_bytes if wire_bytes is None else wire_bytes)
    return DecodeBytes(
        gather=peers * rows_per_rank * sent_values * dtype_bytes,
        all_to_all=peers * rows_per_rank * q_heads * (out_bytes + LSE_BYTES),
    )


def prefill_bytes(num_places: int, part_len: int, kv: KVLayout, dtype_bytes: int) -> int:
    """What the one K/V gather of a prefill step costs: `(num_places - 1) * part_len * (values of kv) * b`.

    It runs over `num_places`: the pcp ranks, or the DCP group where heads are mixed. `part_len` is the padded length of
    every rank's send buffer (`PrefillSplit.part_len`).
    """
    return (num_places - 1) * part_len * kv.values_per_token * dtype_bytes


def prefill_state_bytes(num_places: int, plan: StatePlan, layout: StateLayout, dtype_bytes: int) -> int:
    """What the two gathers of a linear layer cost in a prefill step, whatever the number of its tokens.

    Over `num_places` pcp ranks: the inputs before pieces, in the model's dtype of `dtype_bytes`, then states and maps.
    """
    inputs = plan.num_tails * layout.num_tail * layout.num_channels * dtype_bytes
    states = plan.num_states * layout.state_values + plan.num_maps * layout.map_values
    return (num_places - 1) * (inputs + states * STATE_BYTES)
