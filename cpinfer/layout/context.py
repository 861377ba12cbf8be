"""Prefill of tokens that continue cached ones: the context of a step, sharded over the home that holds it.

What a query sees of its context has no order left to keep (all of it lies before the query), so any shard may answer
for its own tokens, and the answers merge. Either the queries travel to the KV, or the KV travels to the queries
(pass-Q and pass-KV of arXiv:2411.01783, without its ring):

    queries   all_gather of q; every rank attends to its own shard for all of them; (out, lse) back by all_to_all
    kv        all_gather of the cached k, v, a window at a time; every rank attends for its own queries

`choose_exchange` takes what moves fewer bytes, or computes less where nothing moves; where homes hold unequally much,
the work of the busiest rank counts beside the bytes. Layers with a window see little of the context and always have it
travel as KV: its last `window - 1` tokens, gathered once and put in sequence order before the new ones.

The exchange runs along an axis that reaches every shard of the home from every rank that computes tokens: the pcp axis
when `dcp <= pcp`, else the DCP group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.prefill import Piece, PrefillSplit, gathered_rows
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import IntArray, KVSharding
from cpinfer.layout.traffic import LSE_BYTES

Exchange = Literal["queries", "kv"]

# What a rank computes in the time in which it receives a byte, roughly: 50 FLOP over gloo on CPU, from 1,000 on between
# GPUs. It decides only where the ranks that hold a context would compute several times what is their share.
_FLOPS_PER_BYTE = 200


class Place(NamedTuple):
    """Who stands at one place of the exchange axis: the part of the prefill it computes, the KV it holds."""

    pcp_rank: int
    home: int
    shard: int


@dataclass(frozen=True)
class Context:
    """Cached tokens of one prompt of the step, 0 or more, and the home whose shards hold them."""

    num_tokens: int
    home: int
    # In that home; other ranks have no use for it.
    block_table: Sequence[int]


@dataclass(frozen=True)
class StepContext:
    """What the prompts of a prefill step continue: who computes their new tokens, and who holds their cached ones.

    `contexts`: one for each prompt of `split`. `places`: of the exchange axis, in its order.
    """

    split: PrefillSplit
    contexts: Sequence[Context]
    sharding: KVSharding
    places: Sequence[Place]

    def held(self, index: int) -> IntArray:
        """`[prompts]` cached tokens of each that the rank at place `index` stores."""
        place = self.places[index]
        lens = (
            self.sharding.local_len(c.num_tokens, place.shard) if c.home == place.home else 0 for c in self.contexts
        )
        return np.fromiter(lens, dtype=np.int64, count=len(self.contexts))

    def slots(self, prompt: int, local_index: IntArray) -> IntArray:
        """Cache rows of a prompt's tokens on any rank of its home."""
        block, offset = np.divmod(local_index, self.sharding.block_size)
        table = np.asarray(self.contexts[prompt].block_table, dtype=np.int64)
        slots: IntArray = table[block] * self.sharding.block_size + offset
        return slots

    def pieces(self, index: int) -> list[Piece]:
        """What the rank at place `index` computes."""
        return self.split.part(self.places[index].pcp_rank)


@dataclass(frozen=True)
class QueryExchange:
    """Queries travel. `rows` attend to this shard for the tokens of every pcp rank, `part_len` packed queries each."""

    part_len: int
    rows: AttentionRows


@dataclass(frozen=True)
class KVWindow:
    """One gather of cached KV: this rank sends `slots` of its cache, padded to `length`, and its pieces attend to all.

    `rows` index the gathered `[places * length]`, in pages of one token.
    """

    length: int
    slots: IntArray
    rows: AttentionRows


@dataclass(frozen=True)
class KVExchange:
    """KV travels, in windows that bound the scratch."""

    windows: tuple[KVWindow, ...]


@dataclass(frozen=True)
class WindowExchange:
    """What layers with a window see of the context: this rank sends `slots` of its cache, padded to `length`.

    `rows` index the gathered `[places * length]` with the step's new tokens behind it, in pages of one token. Their
    queries are those of this rank from `first_query` on: all of them, or of some prompts.
    """

    length: int
    slots: IntArray
    rows: AttentionRows
    first_query: int = 0

    @property
    def queries(self) -> slice:
        """Which of this rank's packed queries `rows` are about."""
        return slice(self.first_query, self.first_query + self.rows.num_queries)


def exchange_places(grid: RankGrid, rank: int) -> tuple[Place, ...]:
    """The places of the exchange axis that `rank` is on, in the order of its communicator."""
    groups = grid.pcp_groups if grid.context_runs_over_pcp else grid.dcp_groups
    group = next(group for group in groups if rank in group)
    return tuple(Place(grid.coords(r).pcp_rank, grid.home(r), grid.kv_shard(r)) for r in group)


def exchange_bytes(
    exchange: Exchange,
    step: StepContext,
    q_heads: int,
    kv: KVLayout,
    dtype_bytes: int,
) -> int:
    """Bytes that a rank receives per layer. All ranks send what the longest has to.

    Queries: `(n-1) * T * hq * (k_dim * b + v_dim * b + 4)` for T tokens of a part: q there, out and a float32 lse back.
    KV: `(n-1) * P * kvl * (k_dim + v_dim) * b` for P cached tokens of a shard (K alone where V is a prefix of it).
    """
    others = len(step.places) - 1
    if exchange == "kv":
        longest = max(step.held(index).sum() for index in range(len(step.places)))
        return others * int(longest) * kv.values_per_token * dtype_bytes
    tokens = max(1, *step.split.tokens_per_rank())
    return others * tokens * q_heads * ((kv.k_dim + kv.v_dim) * dtype_bytes + LSE_BYTES)


def choose_exchange(
    step: StepContext,
    q_heads: int,
    kv: KVLayout,
    dtype_bytes: int,
    max_absorbed_queries: int | None = None,
) -> Exchange:
    """What moves fewer bytes, queries when equal: to first order they win when `T / P <= kvl / (k * hq)`, k columns.

    Beside the bytes the busiest rank's work counts, which is alike but where homes hold unequally much. At one place
    nothing moves. There latents are expanded ("kv") for prompts of more new tokens than `max_absorbed_queries`,
    weighted by what each has cached; None where nothing is expanded.
    """
    if len(step.places) == 1 and max_absorbed_queries is not None:
        saved = sum(
            step.contexts[pieces[0].prompt].num_tokens * (sum(p.num_tokens for p in pieces) - max_absorbed_queries)
            for pieces in step.split.by_prompt
        )
        return "kv" if saved > 0 else "queries"
    per_pair = 2 * q_heads * (kv.k_dim + kv.v_dim) / _FLOPS_PER_BYTE
    queries, cached = (
        exchange_bytes(exchange, step, q_heads, kv, dtype_bytes) + per_pair * most_pairs(exchange, step)
        for exchange in ("queries", "kv")
    )
    return "queries" if queries <= cached else "kv"


def most_pairs(exchange: Exchange, step: StepContext) -> int:
    """Query-key pairs of the context that the busiest rank attends to, per layer and query head of a rank.

    Queries go to who holds the keys, be it one home of many, with the heads of all columns; keys go to all, each for
    its own queries. Where every context is spread over all ranks both are alike, up to what does not divide.
    """
    cached = [context.num_tokens for context in step.contexts]
    if exchange == "kv":
        return max(
            sum(piece.num_tokens * cached[piece.prompt] for piece in step.pieces(index))
            for index in range(len(step.places))
        )
    new = np.array([sum(piece.num_tokens for piece in pieces) for pieces in step.split.by_prompt], dtype=np.int64)
    num_columns = len(step.places) // step.split.pcp_size
    return num_columns * max(int((step.held(index) * new).sum()) for index in range(len(step.places)))


def plan_query_exchange(step: StepContext, index: int) -> QueryExchange:
    """The rows that place `index` answers for: all pieces of all pcp ranks, each part padded to the longest."""
    held = step.held(index)
    tokens = step.split.tokens_per_rank()
    part_len = max(1, *tokens)
    q_lens: list[int] = []
    kv_lens: list[int] = []
    tables: list[Sequence[int]] = []
    for pcp_rank, num_tokens in enumerate(tokens):
        for piece in step.split.part(pcp_rank):
            q_lens.append(piece.num_tokens)
            kv_lens.append(int(held[piece.prompt]))
            tables.append(step.contexts[piece.prompt].block_table)
        if num_tokens < part_len:
            q_lens.append(part_len - num_tokens)
            kv_lens.append(0)
            tables.append(())
    rows = AttentionRows.build(q_lens, kv_lens, tables, block_size=step.sharding.block_size, causal=False)
    return QueryExchange(part_len, rows)


def plan_kv_exchange(step: StepContext, index: int, workspace_tokens: int) -> KVExchange:
    """The windows in which cached KV is gathered, for the rank at place `index`.

    Each place lines up the tokens it holds, prompt after prompt; window w takes the same stretch of every line. The
    gathered tokens of a window are at most `workspace_tokens`, or one per place.
    """
    num_places = len(step.places)
    held = np.array([step.held(place) for place in range(num_places)])
    starts = np.cumsum(held, axis=1) - held
    line = np.concatenate([step.slots(prompt, np.arange(length)) for prompt, length in enumerate(held[index])])
    stretch = max(1, workspace_tokens // num_places)
    longest = int(held.sum(axis=1).max())
    mine = step.pieces(index)
    windows = []
    for lo in range(0, longest, stretch):
        hi = min(lo + stretch, longest)
        first = np.clip(starts, lo, hi) - lo
        last = np.clip(starts + held, lo, hi) - lo
        rows_of_place = np.arange(num_places) * (hi - lo)
        tables = [
            np.concatenate(
                [
                    np.arange(row + first[place, piece.prompt], row + last[place, piece.prompt])
                    for place, row in enumerate(rows_of_place)
                ]
            )
            for piece in mine
        ]
        rows = AttentionRows.build(
            [piece.num_tokens for piece in mine], [len(t) for t in tables], tables, block_size=1, causal=False
        )
        windows.append(KVWindow(hi - lo, line[lo:hi], rows))
    return KVExchange(tuple(windows))


def plan_window_exchanges(
    step: StepContext, index: int, window: int | None, workspace_tokens: int
) -> tuple[WindowExchange, ...]:
    """The end of every context, as `plan_window_exchange` has it, of some prompts after others.

    So many at a time that at most `workspace_tokens` are seen of their contexts, or one. On all ranks alike.
    """
    bounds, num_seen = [0], 0
    for prompt, context in enumerate(step.contexts):
        seen = context.num_tokens if window is None else min(context.num_tokens, window - 1)
        if num_seen + seen > workspace_tokens and prompt > bounds[-1]:
            bounds.append(prompt)
            num_seen = 0
        num_seen += seen
    bounds.append(len(step.contexts))
    return tuple(plan_window_exchange(step, index, window, range(*pair)) for pair in pairwise(bounds))


def plan_window_exchange(
    step: StepContext, index: int, window: int | None, prompts: range | None = None
) -> WindowExchange:
    """The end of every context, for layers with `window` (None: all of it), gathered for the rank at place `index`.

    Of `prompts` that follow each other, where not all are meant.
    """
    contexts, places, sharding = step.contexts, step.places, step.sharding
    prompts = range(len(contexts)) if prompts is None else prompts
    ends = np.array([c.num_tokens for c in contexts], dtype=np.int64)
    begins = np.zeros_like(ends) if window is None else np.maximum(0, ends - (window - 1))
    # [places, prompts]: local indices [first, last) of the seen tokens that each place holds.
    here = np.array([[c.home == place.home and i in prompts for i, c in enumerate(contexts)] for place in places])
    first, last = (
        np.where(here, np.stack([sharding.local_len(at, place.shard) for place in places]), 0) for at in (begins, ends)
    )
    held = last - first
    length = int(held.sum(axis=1).max())
    line_starts = np.cumsum(held, axis=1) - held
    spans = zip(first[index], last[index], strict=True)
    slots = [step.slots(prompt, np.arange(lo, hi)) for prompt, (lo, hi) in enumerate(spans)]
    new_begin = len(places) * length
    tables = {}
    for prompt in prompts:
        context, position = contexts[prompt], np.arange(begins[prompt], ends[prompt])
        # The place that holds each token: of the home's places, the one with its shard.
        place_of_shard = np.zeros(sharding.num_shards, dtype=np.int64)
        for i, place in enumerate(places):
            if place.home == context.home:
                place_of_shard[place.shard] = i
        holder = place_of_shard[sharding.owner(position)]
        row = holder * length + line_starts[holder, prompt] + sharding.local_index(position) - first[holder, prompt]
        tables[prompt] = np.concatenate([row, new_begin + gathered_rows(step.split, prompt)])
    pieces = step.pieces(index)  # in order of prompts
    mine = [piece for piece in pieces if piece.prompt in prompts]
    seen = ends - begins
    rows = AttentionRows.build(
        [piece.num_tokens for piece in mine],
        [int(seen[piece.prompt]) + piece.end for piece in mine],
        [tables[piece.prompt] for piece in mine],
        block_size=1,
        causal=True,
        begins=begins[np.array([piece.prompt for piece in mine], dtype=np.int64)],
    )
    first_query = sum(piece.num_tokens for piece in pieces if piece.prompt < prompts.start)
    return WindowExchange(length, np.concatenate(slots), rows if window is None else rows.within(window), first_query)
