"""What one attention layer costs on the network, in bytes that a rank receives from others.

The formulas are those of the design (sections 4 and 5); they count payload, padding of the longest rank included, and
no protocol. Tests hold the engine's counted bytes against them.

    R  decode rows per rank      hq, kvl  query and KV heads of a rank      D  head dim      b  bytes per value

>>> decode_bytes(dcp_size=2, rows_per_rank=3, q_heads=4, kv_heads=1, head_dim=128, dtype_bytes=2, pcp_size=2)
DecodeBytes(gather=4608, all_to_all=3120)
>>> prefill_bytes(pcp_size=2, part_len=13, kv_heads=1, head_dim=128, dtype_bytes=2)
6656
"""

from __future__ import annotations

from typing import NamedTuple

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
    kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    pcp_size: int,
    wire_bytes: int | None = None,
) -> DecodeBytes:
    """What a decode step of an unmixed layout costs; nothing at `dcp_size` 1.

    The gather brings the new q of every other rank of the DCP group, packed with their new k and v unless all owners
    have those already (pcp 1): `(dcp-1) * R * (hq + 2*kvl) * D * b`, or `(dcp-1) * R * hq * D * b`. The all-to-all
    brings a partial output and its lse back from each: `(dcp-1) * R * hq * (D * b + 4)`. `wire_bytes` are the bytes per
    value in which outputs travel, `dtype_bytes` when None.
    """
    peers = dcp_size - 1
    packed_heads = q_heads + (2 * kv_heads if pcp_size > 1 else 0)
    out_bytes = head_dim * (dtype_bytes if wire_bytes is None else wire_bytes)
    return DecodeBytes(
        gather=peers * rows_per_rank * packed_heads * head_dim * dtype_bytes,
        all_to_all=peers * rows_per_rank * q_heads * (out_bytes + LSE_BYTES),
    )


def prefill_bytes(pcp_size: int, part_len: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """What the one K/V gather of a prefill step costs: `(pcp-1) * part_len * 2*kvl * D * b`, nothing at `pcp_size` 1.

    `part_len` is the padded length of every rank's send buffer (`PrefillSplit.part_len`).
    """
    return (pcp_size - 1) * part_len * 2 * kv_heads * head_dim * dtype_bytes
