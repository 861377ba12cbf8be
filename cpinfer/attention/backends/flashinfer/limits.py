"""What FlashInfer's plans have room for, as its scheduler works it out (0.6.18, `attention/scheduler.cuh`).

Where its kernels split the keys of a row, partial results wait in a workspace that the caller provides: `tile` rows of
V + 1 floats for each query head of each *work*, a piece of one tile of queries over some keys. Plans that are replayed
always split, into as many works as any plan of as many rows could need.

Letters: H query heads, K KV heads, D head dim of keys, V of values.
"""

from __future__ import annotations

import numpy as np

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.layout.rows import Int32Array

# What FlashInfer recommends.
MIN_WORKSPACE_BYTES = 128 * 2**20
# Allocations within the workspace begin at multiples of 16 bytes.
_SLACK_BYTES = 256
_MAX_TILE = 128
_BLOCKS_PER_SM = 2
# Of any kernel, on any GPU.
_MAX_BLOCKS_PER_SM = 32
# What each wrapper is made with, on the device; as much is pinned on the host.
WRAPPER_BYTES = 8 * 2**20 + 4 * 2**15
# Of one kind of layer and call: of new tokens, of their context, and of the step before, which may still be held.
_PLANS_OF_A_STEP = 4
# A plan of latent attention has room for so many works, and splitting keys adds at most one for each SM.
_MAX_LATENT_WORKS = 16384 - 256


def workspace_bytes(needs: AttentionNeeds, num_sms: int) -> int:
    """Enough for every plan: of any rows where it is made anew, of as many as are replayed.

    Made anew, there are at most two works for each SM, of all heads of a group.
    """
    most = MIN_WORKSPACE_BYTES
    for num_q_heads, layout in needs.calls:
        if layout.v_is_prefix_of_k:  # has kernels of its own, for which the least is enough
            continue
        widest = num_q_heads // layout.num_heads * (layout.v_dim + 1)
        most = max(most, _BLOCKS_PER_SM * num_sms * _MAX_TILE * 4 * widest + _SLACK_BYTES)
        for size in needs.replayed:
            shape = (num_q_heads, layout.num_heads, layout.v_dim, size.num_rows)
            most = max(most, replayed_workspace_bytes(*shape, num_sms=num_sms))
    return most


def replayed_workspace_bytes(num_q_heads: int, num_kv_heads: int, v_dim: int, num_rows: int, num_sms: int) -> int:
    """Enough for plans of `num_rows` rows of one query that are replayed, by the kernels that share tiles in a group.

    >>> replayed_workspace_bytes(64, 8, 128, 128, num_sms=132) <= MIN_WORKSPACE_BYTES
    True
    >>> replayed_workspace_bytes(64, 8, 128, 256, num_sms=132) <= MIN_WORKSPACE_BYTES
    False
    """
    tile, num_works = _replayed_works(num_q_heads // num_kv_heads, num_kv_heads, v_dim, num_rows, num_sms)
    return num_q_heads * num_works * tile * (v_dim + 1) * 4 + _SLACK_BYTES


def replayed_int_bytes(num_q_heads: int, num_kv_heads: int, v_dim: int, num_rows: int, num_sms: int) -> int:
    """Enough for what such a plan says, with tensor cores and without: three numbers and a flag for each work.

    >>> replayed_int_bytes(64, 8, 128, 256, num_sms=132)
    9216
    """
    _, num_works = _replayed_works(num_q_heads // num_kv_heads, num_kv_heads, v_dim, num_rows, num_sms)
    # Without tensor cores there are as many works as blocks fit on the SMs.
    num_works = max(num_works, num_rows, _MAX_BLOCKS_PER_SM * num_sms // num_kv_heads)
    num_bytes = 13 * num_works + 2 * 4 * (num_rows + 1) + _SLACK_BYTES
    return -(-num_bytes // 256) * 256


def device_bytes(needs: AttentionNeeds, num_sms: int) -> int:
    """What plans of an engine keep on a device at most, beside its cache: what they work in, say, and give."""
    total = workspace_bytes(needs, num_sms)
    for num_q_heads, layout in needs.calls:
        heads = (num_q_heads, layout.num_heads, layout.v_dim)
        per_kind = _PLANS_OF_A_STEP * WRAPPER_BYTES
        for size in needs.replayed:
            results = size.num_rows * num_q_heads * (layout.v_dim * needs.dtype.itemsize + 4)
            said = WRAPPER_BYTES if layout.v_is_prefix_of_k else replayed_int_bytes(*heads, size.num_rows, num_sms)
            per_kind += said + results + 4 * (size.num_pages + 4 * size.num_rows)
        total += per_kind * len(needs.layers)
    return total


def _replayed_works(group: int, num_kv_heads: int, v_dim: int, num_rows: int, num_sms: int) -> tuple[int, int]:
    """Queries of a tile, all heads of a group counted, and works of a plan of one query per row that is replayed."""
    tile = 16 if group <= 16 else 64 if group <= 64 or v_dim >= 256 else _MAX_TILE
    tiles = -(-num_rows * group // tile) + num_rows - 1
    return tile, max(_BLOCKS_PER_SM * num_sms // num_kv_heads, tiles)


def has_latent_room(qo_indptr: Int32Array, num_q_heads: int) -> bool:
    """Whether a plan of latent attention has room for these rows. 0.6.18 writes beyond it without a word."""
    packed = np.diff(qo_indptr).astype(np.int64) * num_q_heads
    tile = 64 if packed.mean() < 65 else 128
    return bool((-(-packed // tile)).sum() <= _MAX_LATENT_WORKS)
