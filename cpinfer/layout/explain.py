"""A layout, explained: who holds what, what fits, and what it costs. `tools/explain.py` prints it.

>>> print(draw_grid(RankGrid(tp_size=2, pcp_size=2, dcp_size=2), HeadPlacement(8, 2, tp_size=2)))
       tp0                tp1
pcp0 | 0: q0-3/k0/s0/p0 | 1: q4-7/k1/s0/p0 |
pcp1 | 2: q0-3/k0/s1/p1 | 3: q4-7/k1/s1/p1 |

A DCP group that mixes KV heads stores all of them on each of its ranks:

>>> print(draw_grid(RankGrid(tp_size=2, pcp_size=2, dcp_size=4), HeadPlacement(8, 2, tp_size=2)))
       tp0                  tp1
pcp0 | 0: q0-3/k0-1/s0/p0 | 1: q4-7/k0-1/s2/p0 |
pcp1 | 2: q0-3/k0-1/s1/p1 | 3: q4-7/k0-1/s3/p1 |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from cpinfer.layout.capacity import DTYPE_BYTES, KVLayout, PoolSize, StateLayout
from cpinfer.layout.grid import Group, RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.rules import LayoutSizes, layout_errors
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.traffic import decode_bytes, decode_collectives, prefill_bytes


@dataclass(frozen=True)
class Question:
    """A layout, and as much of the model, the memory and the prompts as is known; None leaves its answers out.

    `kv_head`: what one KV head stores per token and layer. With MLA that is the latent, the one KV head of `sizes`.
    `dtype` is that of activations, in which K and V travel, and of the cache where `cache_dtype` is None. `states`:
    what a rank keeps of a sequence beside its KV, in layers that `num_layers` does not count; `max_num_seqs` run at
    once.
    """

    sizes: LayoutSizes
    num_layers: int | None = None
    kv_head: KVLayout | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    wire_dtype: str | None = None
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    seq_len: int | None = None
    states: StateLayout | None = None
    max_num_seqs: int = 256


@dataclass(frozen=True)
class RankPlace:
    """What one rank computes and stores.

    `q_heads` are its own, `kv_heads` all that its DCP group stores. `kv_copies`, for each of these: how many ranks of
    its home store this head of this shard.
    """

    rank: int
    dp_rank: int
    pcp_rank: int
    tp_rank: int
    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    kv_shard: int
    prefill_part: int
    home: int
    kv_copies: tuple[int, ...]


@dataclass(frozen=True)
class PrefillCost:
    """One prompt of `seq_len` tokens, split over the pcp ranks: `pieces[r]` are the `[start, end)` of part r.

    Bytes are those of a rank that receives most: where only some DCP groups mix KV heads, the others receive less.
    """

    pieces: tuple[tuple[tuple[int, int], ...], ...]
    pairs_per_rank: tuple[int, ...]
    max_over_mean_work: float
    received_bytes_per_rank_per_layer: int | None


@dataclass(frozen=True)
class DecodeCost:
    """One decode step. A rank computes `ceil(sequences of its home / row_ranks)` rows. Bytes as in `PrefillCost`."""

    row_ranks: int
    collectives_per_layer: int
    received_bytes_per_rank_per_layer_per_row: int | None


@dataclass(frozen=True)
class Explanation:
    """Everything that follows from a `Question`; all None but `errors` when the layout is refused.

    Groups of `dcp` are in shard order. Capacity is that of one dp replica: of one home, which a single sequence can
    fill, and of all homes together, which is what `max_concurrency` sequences of `max_model_len` tokens share. The rank
    that stores the most KV heads bounds it, since all ranks have the same blocks. Where sequences have states, each
    lies on one pcp rank, and `max_states` of a replica may run at once.
    """

    valid: bool
    errors: list[str]
    groups: dict[str, tuple[Group, ...]] | None = None
    ranks: tuple[RankPlace, ...] | None = None
    kv_local_lens: tuple[int, ...] | None = None
    kv_bytes_per_token_per_rank: int | None = None
    kv_capacity_tokens: int | None = None
    kv_capacity_tokens_total: int | None = None
    max_concurrency: float | None = None
    prefill: PrefillCost | None = None
    decode: DecodeCost | None = None
    state_bytes_per_sequence: int | None = None
    max_states: int | None = None


def explain(question: Question) -> Explanation:
    """The `Explanation` of a layout; `valid` False, never an exception, for one that breaks a rule."""
    sizes = question.sizes
    errors = layout_errors(sizes)
    if errors:
        return Explanation(valid=False, errors=errors)
    grid = RankGrid(sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)
    heads = HeadPlacement(sizes.num_q_heads, sizes.num_kv_heads, sizes.tp_size)
    sharding = KVSharding(sizes.dcp_size, sizes.interleave, sizes.block_size)
    length = question.seq_len

    capacity = total = concurrency = num_states = None
    pool = pool_size(question)
    if pool is not None:
        num_states = pool.num_states * grid.pcp_size if question.states is not None else None
        capacity, total = pool.capacity_tokens, pool.capacity_tokens * grid.num_homes
        if question.max_model_len is not None:
            concurrency = pool.max_concurrency(question.max_model_len) * grid.num_homes
    return Explanation(
        valid=True,
        errors=[],
        groups={"tp": grid.tp_groups, "pcp": grid.pcp_groups, "dcp": grid.dcp_groups},
        ranks=tuple(rank_places(grid, heads)),
        kv_local_lens=None if length is None else tuple(sharding.local_len(length, s) for s in range(sizes.dcp_size)),
        kv_bytes_per_token_per_rank=token_bytes(question),
        kv_capacity_tokens=capacity,
        kv_capacity_tokens_total=total,
        max_concurrency=concurrency,
        prefill=None if length is None else _prefill_cost(question, length, grid, heads),
        decode=_decode_cost(question, grid, heads),
        state_bytes_per_sequence=None
        if question.states is None
        else question.states.bytes_per_sequence(question.dtype),
        max_states=num_states,
    )


def token_bytes(question: Question) -> int | None:
    """Bytes of a token on a rank of a legal layout that stores it; None where the model is not known."""
    sizes = question.sizes
    if question.num_layers is None or question.kv_head is None:
        return None
    grid = RankGrid(sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)
    stored = HeadPlacement(sizes.num_q_heads, sizes.num_kv_heads, sizes.tp_size).max_stored_heads(grid)
    kv = replace(question.kv_head, num_heads=stored)
    return kv.bytes_per_token(question.num_layers, question.cache_dtype or question.dtype)


def pool_size(question: Question) -> PoolSize | None:
    """The KV pool of each rank of a legal layout; None where the model or the budget is not known."""
    sizes, per_token = question.sizes, token_bytes(question)
    if per_token is None or question.kv_cache_gib is None:
        return None
    num_bytes = int(question.kv_cache_gib * 2**30)
    sharding = KVSharding(sizes.dcp_size, sizes.interleave, sizes.block_size)
    if question.states is None:
        return PoolSize.from_bytes(num_bytes, per_token, sharding)
    per_state, max_states = (
        question.states.bytes_per_sequence(question.dtype),
        -(-question.max_num_seqs // sizes.pcp_size),
    )
    return PoolSize.beside_states(num_bytes, per_token, sharding, per_state, max_states)


def rank_places(grid: RankGrid, heads: HeadPlacement) -> list[RankPlace]:
    """Every rank of a layout, in rank order."""
    stored = [heads.in_group(grid, tp_rank).kv_heads for tp_rank in range(grid.tp_size)]
    at = [grid.coords(rank) for rank in range(grid.world_size)]
    # Where each rank's heads are kept: heads of one key are copies of each other.
    keys = [[(c.dp_rank, grid.home(r), grid.kv_shard(r), h) for h in stored[c.tp_rank]] for r, c in enumerate(at)]
    copies = Counter(chain.from_iterable(keys))
    return [
        RankPlace(
            rank=rank,
            **coords._asdict(),
            q_heads=tuple(heads.q_heads(coords.tp_rank)),
            kv_heads=stored[coords.tp_rank],
            kv_shard=grid.kv_shard(rank),
            prefill_part=coords.pcp_rank,
            home=grid.home(rank),
            kv_copies=tuple(copies[key] for key in keys[rank]),
        )
        for rank, coords in enumerate(at)
    ]


def draw_grid(grid: RankGrid, heads: HeadPlacement) -> str:
    """The rank table of a layout, one block per dp replica.

    A cell is rank: query heads / stored KV heads / KV shard / prefill part, and / home when there are several.
    """
    places = rank_places(grid, heads)
    cells = [
        f"{p.rank}: q{_span(p.q_heads)}/k{_span(p.kv_heads)}/s{p.kv_shard}/p{p.prefill_part}"
        + (f"/h{p.home}" if grid.num_homes > 1 else "")
        for p in places
    ]
    width = max(map(len, cells))
    labels = [f"pcp{p}" for p in range(grid.pcp_size)]
    indent = len(labels[-1])
    blocks = []
    for d in range(grid.dp_size):
        title = f"dp{d}" if grid.dp_size > 1 else ""
        columns = "   ".join(f"tp{t}".ljust(width) for t in range(grid.tp_size))
        lines = [f"{title.ljust(indent)}   {columns}".rstrip()]
        for p, label in enumerate(labels):
            first = grid.rank(d, p, 0)
            row = " | ".join(cell.ljust(width) for cell in cells[first : first + grid.tp_size])
            lines.append(f"{label.ljust(indent)} | {row} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _prefill_cost(question: Question, seq_len: int, grid: RankGrid, heads: HeadPlacement) -> PrefillCost:
    pcp = grid.pcp_size
    split = zigzag_split([seq_len], pcp, assigned=[None if pcp > 1 else 0])
    pairs = split.pairs_per_rank()
    received = None
    if question.kv_head is not None:
        received = prefill_bytes(
            num_places=grid.dcp_size if heads.mixes_heads(grid) else pcp,
            part_len=split.part_len,
            kv=replace(question.kv_head, num_heads=heads.kv_heads_per_rank),
            dtype_bytes=DTYPE_BYTES[question.dtype],
        )
    return PrefillCost(
        pieces=tuple(tuple((piece.start, piece.end) for piece in split.part(r)) for r in range(pcp)),
        pairs_per_rank=tuple(pairs),
        max_over_mean_work=max(pairs) * pcp / sum(pairs),
        received_bytes_per_rank_per_layer=received,
    )


def _decode_cost(question: Question, grid: RankGrid, heads: HeadPlacement) -> DecodeCost:
    received = None
    if question.kv_head is not None:
        received = decode_bytes(
            dcp_size=grid.dcp_size,
            rows_per_rank=1,
            q_heads=heads.q_heads_per_rank,
            kv=replace(question.kv_head, num_heads=heads.kv_heads_per_rank),
            dtype_bytes=DTYPE_BYTES[question.dtype],
            sends_new_kv=grid.pcp_size > 1 or heads.mixes_heads(grid),
            wire_bytes=DTYPE_BYTES[question.wire_dtype or question.dtype],
        ).total
    return DecodeCost(grid.row_ranks, decode_collectives(grid.dcp_size), received)


def _span(heads: Sequence[int]) -> str:
    return f"{heads[0]}" if len(heads) == 1 else f"{heads[0]}-{heads[-1]}"
