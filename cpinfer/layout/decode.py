"""One decode step: every running sequence computes its next token.

Rows (sequences) are dealt over the pcp ranks, `R = ceil(rows / pcp)` to each, so that everything but attention is done
once per row; a rank short of rows is padded with dummies (position 0, no keys, nothing written). Each rank takes
neighbours, so that a gather has all rows in their own order, where samples of one prompt stay side by side. Rows whose
model keeps a state of them stay with the rank that has it.

    5 rows over pcp=2:      pcp0 | row 0 | row 1 | row 2 |        after the gather over pcp, in place order:
                            pcp1 | row 3 | row 4 |   -   |        0 1 2 3 4 -
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import IntArray, KVSharding


@dataclass(frozen=True)
class DecodePlan:
    """What one rank does in a decode step.

    `gathered`: `[pcp * R]` the rows of all pcp ranks in the order a gather over the pcp axis brings them, as indices
    into the step's sequences, -1 for padding.
    `gathered_positions`: `[pcp * R]` positions of their new tokens, 0 for padding.
    `own`, `positions`: `[R]` those of this rank.
    `write_src`, `write_slots`: `[W]` which of the gathered rows this shard stores, and where.
    `rows`: one query row per gathered row, over the keys of this shard, the new token included.
    """

    gathered: IntArray
    gathered_positions: IntArray
    own: IntArray
    positions: IntArray
    write_src: IntArray
    write_slots: IntArray
    rows: AttentionRows


def plan_decode(
    positions: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    sharding: KVSharding,
    *,
    pcp_size: int,
    pcp_rank: int,
    shard: int,
    rows_per_rank: int | None = None,
    ranks: Sequence[int] | None = None,
) -> DecodePlan:
    """Plan the step for the rank at `pcp_rank` that holds `shard`.

    `positions[i]` is where the new token of sequence i goes (its length before this step) and `block_tables[i]` already
    covers it. There must be at least one sequence. `rows_per_rank` and `ranks` as `assign_rows` has them.
    """
    if not positions:
        raise ValueError("a decode step needs at least one sequence")
    gathered = assign_rows(len(positions), pcp_size, rows_per_rank, ranks)
    is_real = gathered >= 0
    at = np.asarray(positions, dtype=np.int64)[gathered] * is_real
    rows = AttentionRows.build(
        np.ones(len(gathered), dtype=np.int32),
        _kv_lens(at, is_real, sharding, shard),
        [() if i < 0 else block_tables[i] for i in gathered.tolist()],
        block_size=sharding.block_size,
        # One query at the end of its keys sees them all, and in another shard's tokens there is no order to keep.
        causal=False,
    )
    return _planned(gathered, at, rows, sharding, pcp_size=pcp_size, pcp_rank=pcp_rank, shard=shard)


def plan_next_decode(
    plan: DecodePlan,
    block_tables: Sequence[Sequence[int]],
    sharding: KVSharding,
    *,
    pcp_size: int,
    pcp_rank: int,
    shard: int,
) -> DecodePlan:
    """What `plan_decode` plans when the sequences of `plan` have a token more each, at a part of its cost.

    Who computes what has not changed, and of the tables only the last block of those that begin one is looked at:
    `plan.rows` goes on naming blocks that were given back since. IndexError where a table lacks a block.
    """
    is_real = plan.gathered >= 0
    at = plan.gathered_positions + is_real
    kv_lens = _kv_lens(at, is_real, sharding, shard)

    def blocks_of(rows: IntArray) -> list[int]:
        last = (kv_lens[rows] - 1) // sharding.block_size
        return [block_tables[i][block] for i, block in zip(plan.gathered[rows].tolist(), last.tolist(), strict=True)]

    rows = plan.rows.grown(kv_lens, blocks_of)
    return _planned(plan.gathered, at, rows, sharding, pcp_size=pcp_size, pcp_rank=pcp_rank, shard=shard)


def _planned(
    gathered: IntArray,
    at: IntArray,
    rows: AttentionRows,
    sharding: KVSharding,
    *,
    pcp_size: int,
    pcp_rank: int,
    shard: int,
) -> DecodePlan:
    """The plan of gathered rows whose new tokens are `at` these places. Their owners alone keep their K and V."""
    write_src = np.flatnonzero((gathered >= 0) & (sharding.owner(at) == shard))
    last_blocks = rows.block_ids[rows.block_indptr[write_src + 1] - 1].astype(np.int64)
    return DecodePlan(
        gathered=gathered,
        gathered_positions=at,
        own=gathered.reshape(pcp_size, -1)[pcp_rank],
        positions=at.reshape(pcp_size, -1)[pcp_rank],
        write_src=write_src,
        write_slots=last_blocks * sharding.block_size + (rows.kv_hi[write_src] - 1) % sharding.block_size,
        rows=rows,
    )


def _kv_lens(at: IntArray, is_real: NDArray[np.bool_], sharding: KVSharding, shard: int) -> NDArray[np.int32]:
    """`[rows]` keys of this shard that each row sees, its new token at `at` included."""
    return (sharding.local_len(at + 1, shard) * is_real).astype(np.int32)


def rows_in_window(plan: DecodePlan, sharding: KVSharding, shard: int, window: int) -> AttentionRows:
    """The rows of a plan, as layers see them whose queries see the last `window` tokens, their own included.

    Of the tokens from position `lo` on a shard holds those from `local_len(lo)` on.
    """
    return plan.rows.above(sharding.local_len(np.maximum(0, plan.gathered_positions - window + 1), shard))


def writing_all(plan: DecodePlan, padding_slot: int) -> DecodePlan:
    """The same plan, in which every gathered row is written: those of other shards to `padding_slot`, which none reads.

    So what is written is as much in every step, and does not decide how much work there is.
    """
    slots = np.full(len(plan.gathered), padding_slot, dtype=np.int64)
    slots[plan.write_src] = plan.write_slots
    return replace(plan, write_src=np.arange(len(plan.gathered)), write_slots=slots)


def cuda_graph_batch_size(rows_per_rank: int) -> int:
    """The CUDA-graph batch size of a step: the rows that it is padded to, at most half as many again.

    >>> [cuda_graph_batch_size(n) for n in (1, 2, 3, 5, 9, 17, 25, 33, 100)]
    [1, 2, 4, 6, 12, 24, 32, 48, 128]
    """
    power = 1 << max(0, rows_per_rank - 1).bit_length()
    return power * 3 // 4 if power >= 8 and rows_per_rank <= power * 3 // 4 else power


def assign_rows(
    num_rows: int, pcp_size: int, rows_per_rank: int | None = None, ranks: Sequence[int] | None = None
) -> IntArray:
    """`[pcp * R]` rows in gathered order, -1 for padding; R is what is needed, or `rows_per_rank`.

    `ranks`: who computes each row, where they are not free to go anywhere: each is where its state lies.

    >>> assign_rows(5, 2).tolist()
    [0, 1, 2, 3, 4, -1]
    >>> assign_rows(2, 2, rows_per_rank=2).tolist()
    [0, 1, -1, -1]
    >>> assign_rows(3, 2, ranks=[1, 0, 1]).tolist()
    [1, -1, 0, 2]
    """
    counts = None if ranks is None else np.bincount(np.asarray(ranks), minlength=pcp_size)
    needed = -(-num_rows // pcp_size) if counts is None else int(counts.max())
    per_rank = needed if rows_per_rank is None else rows_per_rank
    if per_rank < needed:
        raise ValueError(f"{num_rows} rows do not fit {per_rank} on each of {pcp_size} ranks")
    if counts is None:
        place = np.arange(per_rank * pcp_size)
        place[num_rows:] = -1
        return place
    assigned = np.full((pcp_size, per_rank), -1, dtype=np.int64)
    for rank, own in enumerate(assigned):
        own[: counts[rank]] = np.flatnonzero(np.asarray(ranks) == rank)
    return assigned.reshape(-1)
