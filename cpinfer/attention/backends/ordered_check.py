"""The ordered backend on a device that tests have not seen: whether it attends, and whether its bits are kept there.

Letters: T queries, H query heads, K KV heads, D head dim of keys, V of values, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.ordered_backend import OrderedBackend
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.errors import BackendFaultError
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import KVSharding
from cpinfer.ops.ordered_attention import OrderedAttention, merge_ordered
from cpinfer.ops.states import State

NUM_TOKENS = 333
# Queries that are computed together, beside all at once: alone, and across what a program takes.
PARTS = ((0, 1), (100, 101), (5, 200), (332, 333))
_SCALE = 0.1


def ordered_fault(needs: AttentionNeeds, num_shards: int, interleave: int, device: torch.device) -> str | None:
    """What is wrong with attention in order on `device`, in words; None when nothing is.

    Beside the definition of attention, in each kind of call; and bit for bit: queries alone beside all together, and
    virtual shards on two KV shards beside all on one.
    """
    try:
        check_backend(OrderedBackend(num_shards, interleave), needs, device)
    except BackendFaultError as error:
        return str(error)
    for num_q_heads, layout in needs.calls:
        for dtype in needs.key_dtypes(layout):
            inputs = _inputs(num_q_heads, layout, needs.dtype, dtype, device)
            what = _other_bits(*inputs, num_shards, interleave)
            if what is not None:
                return (
                    f"attention of {num_q_heads} heads over {layout}, {needs.dtype} over {dtype}, has other bits {what}"
                )
    return None


def _other_bits(q: Tensor, keys: Tensor, values: Tensor, num_shards: int, interleave: int) -> str | None:
    def attend(first: int, last: int) -> State:
        rows = _rows(last - first, range(last), causal=True)
        return OrderedAttention(rows, num_shards, interleave).run(q[first:last], keys, values, scale=_SCALE)

    whole = attend(0, len(q))
    for first, last in PARTS:
        if not _same(attend(first, last), (whole[0][first:last], whole[1][first:last])):
            return f"for queries [{first}, {last}) than beside others"
    if num_shards % 2 == 0:
        states = []
        for shard in range(2):
            held = KVSharding(2, interleave, block_size=1).positions(len(keys), shard)
            planned = OrderedAttention(_rows(1, held.tolist(), causal=False), num_shards // 2, interleave)
            states.append(planned.states(q[-1:], keys, values, scale=_SCALE))
        # Of two shards, shard s holds the virtual shards s, s + 2, ...
        outs, lses = (torch.stack(parts, dim=3).flatten(2, 3) for parts in zip(*states, strict=True))
        if not _same(merge_ordered(outs.movedim(2, 0), lses.movedim(2, 0)), (whole[0][-1:], whole[1][-1:])):
            return "over two KV shards than over one"
    return None


def _rows(num_queries: int, table: Sequence[int], *, causal: bool) -> AttentionRows:
    return AttentionRows.build([num_queries], [len(table)], [table], block_size=1, causal=causal)


def _inputs(
    num_q_heads: int, layout: KVLayout, dtype: torch.dtype, key_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[S, H, D]`, keys `[S, K, D]`, values `[S, K, V]`."""
    generator = torch.Generator().manual_seed(0)

    def normal(num_heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(NUM_TOKENS, num_heads, dim, generator=generator).to(device, dtype)

    keys = normal(layout.num_heads, layout.k_dim, key_dtype)
    is_prefix = layout.v_is_prefix_of_k
    values = keys[..., : layout.v_dim] if is_prefix else normal(layout.num_heads, layout.v_dim, key_dtype)
    return normal(num_q_heads, layout.k_dim, dtype), keys, values


def _same(a: State, b: State) -> bool:
    return all(map(torch.equal, a, b))
