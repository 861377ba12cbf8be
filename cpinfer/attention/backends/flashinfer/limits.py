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
# A plan of latent attention has room for so many works, and splitting keys adds at most one for each SM.
_MAX_LATENT_WORKS = 16384 - 256


def workspace_bytes(needs: AttentionNeeds, num_sms: int) -> int:
    """Enough for every plan that is made anew, of any rows: at most two works for each SM, of all heads of a group."""
    # Latent attention has kernels of its own, for which the least is enough.
    plain = [(num_q_heads, layout) for num_q_heads, layout in needs.calls if not layout.v_is_prefix_of_k]
    widest = max((num_q_heads // layout.num_heads * (layout.v_dim + 1) for num_q_heads, layout in plain), default=0)
    return max(MIN_WORKSPACE_BYTES, _BLOCKS_PER_SM * num_sms * _MAX_TILE * 4 * widest + _SLACK_BYTES)


def replayed_workspace_bytes(num_q_heads: int, num_kv_heads: int, v_dim: int, num_rows: int, num_sms: int) -> int:
    """Enough for plans of `num_rows` rows of one query that are replayed, by the kernels that share tiles in a group.

    >>> replayed_workspace_bytes(64, 8, 128, 128, num_sms=132) <= MIN_WORKSPACE_BYTES
    True
    >>> replayed_workspace_bytes(64, 8, 128, 256, num_sms=132) <= MIN_WORKSPACE_BYTES
    False
    """
    group = num_q_heads // num_kv_heads
    tile = 16 if group <= 16 else 64 if group <= 64 or v_dim >= 256 else _MAX_TILE
    tiles = -(-num_rows * group // tile) + num_rows - 1
    num_works = max(_BLOCKS_PER_SM * num_sms // num_kv_heads, tiles)
    return num_q_heads * num_works * tile * (v_dim + 1) * 4 + _SLACK_BYTES


def has_latent_room(qo_indptr: Int32Array, num_q_heads: int) -> bool:
    """Whether a plan of latent attention has room for these rows. 0.6.18 writes beyond it without a word."""
    packed = np.diff(qo_indptr).astype(np.int64) * num_q_heads
    tile = 64 if packed.mean() < 65 else 128
    return bool((-(-packed // tile)).sum() <= _MAX_LATENT_WORKS)
