"""One prefill step: prompts are computed by all pcp ranks, load-balanced for the causal mask by the zigzag split.

A prompt of q tokens is cut into n = 2 * pcp pieces; rank r takes pieces r and n-1-r, one from the head, cheap, and one
from the tail, dear (zigzag, or head-tail: as in SGLang, Megatron and ring-flash-attention):

    pcp=2, q=8         piece    0    1    2    3          work of a row grows with its end, so 0+3 = 1+2
                       tokens  0 1  2 3  4 5  6 7
                       rank     0    1    1    0

Every rank sends the K and V of its tokens; the gathered buffer is read through a table that puts pages of
`page_size` tokens back in sequence order, so nothing is copied after the gather:

    rank 0 sends 0 1 6 7, rank 1 sends 2 3 4 5      gathered  0 1 6 7 2 3 4 5      table (page 2)  0 2 3 1

Each piece is one row of a variable-length batch: its queries, and all keys up to its end. Prompts too short to be worth
cutting stay whole on one rank.

>>> zigzag_cuts(8, pcp_size=2).tolist()
[0, 2, 4, 6, 8]
>>> zigzag_cuts(25, pcp_size=2, page_size=4).tolist()
[0, 4, 12, 20, 25]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import IntArray, KVSharding

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Piece:
    """Tokens `[start, end)` of prompt `prompt`, never empty, at row `offset` of the buffer that `pcp_rank` sends."""

    prompt: int
    start: int
    end: int
    pcp_rank: int
    offset: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_pairs(self) -> int:
        """Query-key pairs its causal rows compute: each query at position p sees p + 1 keys."""
        return (self.end * (self.end + 1) - self.start * (self.start + 1)) // 2


@dataclass(frozen=True)
class PrefillSplit:
    """Who computes which tokens: the same value on every rank.

    `pieces` are in order of rank, then of offset. `part_len` is the length of every rank's send buffer, padded to the
    longest; `page_size` the tokens per page of the gathered buffer.
    """

    pieces: tuple[Piece, ...]
    pcp_size: int
    part_len: int
    page_size: int

    def part(self, pcp_rank: int) -> list[Piece]:
        return [piece for piece in self.pieces if piece.pcp_rank == pcp_rank]

    @cached_property
    def by_prompt(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of each prompt, in sequence order."""
        prompts: dict[int, list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda p: (p.prompt, p.start)):
            prompts.setdefault(piece.prompt, []).append(piece)
        return tuple(map(tuple, prompts.values()))

    def tokens_per_rank(self) -> list[int]:
        return [sum(piece.num_tokens for piece in self.part(r)) for r in range(self.pcp_size)]

    def pairs_per_rank(self) -> list[int]:
        """Attention work of every rank, in query-key pairs."""
        return [sum(piece.num_pairs for piece in self.part(r)) for r in range(self.pcp_size)]


@dataclass(frozen=True)
class PrefillPlan:
    """What one rank does in a prefill step; its T tokens are packed piece after piece.

    `pieces`: which tokens these are, counted from the first new one. `positions`: `[T]` in the sequence.
    `send_rows`: `[T]` their rows in the send buffer.
    `rows`: one row per piece, over the gathered buffer `[pcp * part_len]`, causal.
    `write_src`, `write_slots`: `[W]` rows of the gathered buffer that this shard stores, and where.
    `sample_rows`: `[P]` for each prompt the packed row of its last token, -1 where another rank has it.
    `sample_owner`: `[P]` the pcp rank that has it.
    """

    split: PrefillSplit
    pieces: tuple[Piece, ...]
    positions: IntArray
    send_rows: IntArray
    rows: AttentionRows
    write_src: IntArray
    write_slots: IntArray
    sample_rows: IntArray
    sample_owner: IntArray


def zigzag_cuts(num_tokens: int, pcp_size: int, page_size: int = 1) -> IntArray:
    """`[2 * pcp + 1]` cut points of a prompt, ascending, multiples of `page_size` except the last.

    Pieces may be empty (a prompt of one token has one piece that is not). The work of ranks differs by at most 1 %
    when `page_size <= num_tokens / (200 * (pcp_size - 1))`.
    """
    n = 2 * pcp_size
    num_pages = -(-num_tokens // page_size)
    cuts = np.minimum(num_tokens, page_size * (np.arange(n + 1, dtype=np.int64) * num_pages // n))
    cuts[n] = num_tokens
    return cuts


@dataclass(frozen=True)
class StepCost:
    """Time of one rank in a prefill step, in units of one token's linear layers.

    A rank takes the time of at least `floor_tokens`: below that its linear layers wait for weights, not for arithmetic.
    `row_tokens` is what one attention row costs however short it is, and `pairs_per_token` how many query-key pairs
    cost as much as a token's linear layers: parameters per layer / (2 * heads * head_dim), about 6 * hidden_size.
    """

    floor_tokens: int = 256
    row_tokens: int = 16
    pairs_per_token: int = 4096

    def of(self, load: FloatArray) -> FloatArray:
        """Time of ranks whose `load` is `[..., 3]`: tokens, rows, pairs."""
        tokens, rows, pairs = load[..., 0], load[..., 1], load[..., 2]
        return np.maximum(tokens, self.floor_tokens) + rows * self.row_tokens + pairs / self.pairs_per_token


# So many of a step's prompts are split at most: to consider more would cost by the square of their number, and among
# so many the short ones balance the ranks whole.
MAX_SPLIT = 256


def assign_prompts(
    prompt_lens: Sequence[int],
    pcp_size: int,
    cost: StepCost = StepCost(),
    context_lens: Sequence[int] | None = None,
) -> list[int | None]:
    """For each prompt the pcp rank that takes it whole, or None where it is split over all of them.

    `context_lens`: cached tokens that all new tokens of a prompt attend to as well; default 0.

    The longest are split, the others dealt whole, longest first, each to the rank that is soonest done with it. How
    many are split (up to `MAX_SPLIT`) is decided by the time of the slowest rank; as few as possible when it is equal.

    >>> assign_prompts([200], pcp_size=8), assign_prompts([4000], pcp_size=8)
    ([0], [None])
    >>> assign_prompts([4000, 300, 300], pcp_size=2)
    [None, 0, 1]
    """
    if pcp_size == 1:
        return [0] * len(prompt_lens)
    order = sorted(range(len(prompt_lens)), key=lambda i: (-prompt_lens[i], i))
    # All choices at once: in row j the j longest are split. One by one, each prompt would look better split.
    num_choices = min(len(order), MAX_SPLIT) + 1
    load = np.zeros((num_choices, pcp_size, 3))
    takers = np.zeros((len(order), num_choices), dtype=np.int64)
    for k, i in enumerate(order):
        q = prompt_lens[i]
        work = np.array([q, 1, q * (q + 1) / 2 + q * (context_lens[i] if context_lens else 0)])
        load[k + 1 :] += np.array([q / pcp_size, 2, work[2] / pcp_size])
        whole = load[: k + 1]
        # Below the floor many ranks look equally free: of these the one with the fewest tokens.
        takers[k, : k + 1] = np.lexsort((whole[..., 0], cost.of(whole + work)), axis=-1)[:, 0]
        whole[np.arange(len(whole)), takers[k, : k + 1]] += work
    num_split = int(cost.of(load).max(axis=1).argmin())
    assigned: list[int | None] = [None] * len(order)
    for k in range(num_split, len(order)):
        assigned[order[k]] = int(takers[k, num_split])
    return assigned


def zigzag_split(
    prompt_lens: Sequence[int], pcp_size: int, *, page_size: int = 1, assigned: Sequence[int | None] | None = None
) -> PrefillSplit:
    """The zigzag split of prompts of at least one token each. `assigned` is of `assign_prompts`, None splits all."""
    if min(prompt_lens, default=0) < 1:
        raise ValueError("a prefill step needs at least one prompt, and every prompt at least one token")
    offsets = [0] * pcp_size
    pieces = []
    for prompt, q in enumerate(prompt_lens):
        whole_on = None if assigned is None else assigned[prompt]
        cuts = zigzag_cuts(q, pcp_size, page_size) if whole_on is None else np.array([0, q])
        n = len(cuts) - 1
        for i in range(n):
            start, end = int(cuts[i]), int(cuts[i + 1])
            if start == end:
                continue
            r = min(i, n - 1 - i) if whole_on is None else whole_on
            pieces.append(Piece(prompt, start, end, r, offsets[r]))
            # Only a prompt's last piece can end inside a page; what follows it starts on a new one.
            offsets[r] += -(-(end - start) // page_size) * page_size
    return PrefillSplit(tuple(sorted(pieces, key=lambda p: (p.pcp_rank, p.offset))), pcp_size, max(offsets), page_size)


@dataclass(frozen=True)
class ScoredRows:
    """Tokens whose logits are wanted beside those that sample, of all prompts of a step, prompt after prompt.

    `places[i]` is (pcp rank, which of that rank's wanted rows) for the i-th of them. `rows` are this rank's, packed,
    and `own` their (prompt, place in the sequence).
    """

    places: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    own: tuple[tuple[int, int], ...]


def plan_scored_rows(plan: PrefillPlan, wanted: Sequence[range], context_lens: Sequence[int]) -> ScoredRows:
    """Where the `wanted` places of each prompt are computed; ranges may be empty, and lie within its new tokens."""
    if not any(map(len, wanted)):
        return ScoredRows((), (), ())
    places: dict[tuple[int, int], tuple[int, int]] = {}
    counts = [0] * plan.split.pcp_size
    for piece in plan.split.pieces:
        begin = context_lens[piece.prompt]
        for place in _overlap(wanted[piece.prompt], range(begin + piece.start, begin + piece.end)):
            places[piece.prompt, place] = (piece.pcp_rank, counts[piece.pcp_rank])
            counts[piece.pcp_rank] += 1
    rows: list[int] = []
    own: list[tuple[int, int]] = []
    packed = 0
    for piece in plan.pieces:
        begin = context_lens[piece.prompt]
        for place in _overlap(wanted[piece.prompt], range(begin + piece.start, begin + piece.end)):
            rows.append(packed + place - begin - piece.start)
            own.append((piece.prompt, place))
        packed += piece.num_tokens
    in_order = (places[prompt, place] for prompt, span in enumerate(wanted) for place in span)
    return ScoredRows(tuple(in_order), tuple(rows), tuple(own))


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def gathered_rows(split: PrefillSplit, prompt: int) -> IntArray:
    """Rows of the gathered buffer that hold the tokens of a prompt, in sequence order."""
    firsts = [(piece.pcp_rank * split.part_len + piece.offset, piece.num_tokens) for piece in split.by_prompt[prompt]]
    return np.concatenate([np.arange(first, first + n) for first, n in firsts])


def plan_prefill(
    split: PrefillSplit,
    block_tables: Sequence[Sequence[int] | None],
    sharding: KVSharding,
    *,
    pcp_rank: int,
    shard: int,
    context_lens: Sequence[int] | None = None,
) -> PrefillPlan:
    """Plan the step for the rank at `pcp_rank` that holds `shard`.

    `block_tables`: one per prompt, in this rank's home; None where the prompt is stored in others alone.
    `context_lens`: tokens of each prompt that are cached already, so that its new ones begin there; default 0.
    """
    context_lens = context_lens or [0] * len(block_tables)
    by_prompt = split.by_prompt
    gathered = [gathered_rows(split, prompt) for prompt in range(len(block_tables))]
    mine = split.part(pcp_rank)

    slots = [
        np.full(len(rows), -1)
        if table is None
        else sharding.slots(np.asarray(table, dtype=np.int64), np.arange(begin, begin + len(rows)), shard)
        for table, rows, begin in zip(block_tables, gathered, context_lens, strict=True)
    ]
    all_slots, all_rows = np.concatenate(slots), np.concatenate(gathered)
    kept = all_slots >= 0

    ends = np.cumsum([p.num_tokens for p in mine], dtype=np.int64)
    last = {p.prompt: int(end) - 1 for p, end in zip(mine, ends, strict=True) if p == by_prompt[p.prompt][-1]}
    page = split.page_size
    return PrefillPlan(
        split=split,
        pieces=tuple(mine),
        positions=_concat([context_lens[p.prompt] + np.arange(p.start, p.end) for p in mine]),
        send_rows=_concat([np.arange(p.offset, p.offset + p.num_tokens) for p in mine]),
        rows=AttentionRows.build(
            [p.num_tokens for p in mine],
            [p.end for p in mine],
            [gathered[p.prompt][::page] // page for p in mine],
            block_size=page,
            causal=True,
        ),
        write_src=all_rows[kept],
        write_slots=all_slots[kept],
        sample_rows=np.array([last.get(i, -1) for i in range(len(by_prompt))], dtype=np.int64),
        sample_owner=np.array([pieces[-1].pcp_rank for pieces in by_prompt], dtype=np.int64),
    )


def _concat(arrays: list[IntArray]) -> IntArray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
