"""States of linear attention in a prefill step: which pieces a rank runs, and what has to travel to join them.

Such a layer keeps of a sequence a state and the last inputs of its short convolution, of one size whatever the length.
They lie on one rank of the sequence's home, its row's, which may be another than those that compute its pieces. Pieces
of a prompt that follow each other on one rank are run as one *span*:

    pcp=2       piece    0    1    2    3           a span that begins with a start that its rank knows runs on it and
                rank     0    1    1    0           says what comes out, B; any other is *open*: it says B and M, and
                span     0    1    1    2           S_end = M S_start + B

Every rank sends two messages per layer: the last `num_tail` inputs of each of its spans, behind them those before each
prompt whose state it keeps; and, once the rule has run, B of each span, behind them the states it keeps of prompts that
begin on other ranks, and M of each open span. From these all ranks can make the state behind any span, and each makes
those that it needs: before its open spans, and behind prompts whose states it is to keep.

>>> from cpinfer.layout.prefill import zigzag_split
>>> plan = plan_states(zigzag_split([8], 2), [PromptStates(None, (StatePlace(1, 5),))], pcp_rank=1, num_tail=3)
>>> plan.lens, plan.starts, (plan.num_tails, plan.num_states, plan.num_maps)
((4,), (-2,), (2, 2, 1))
>>> plan.chains[0].links, plan.chains[0].reads, plan.chains[0].slots
(((0, -1), (2, 1), (1, 0)), ((1, 0),), (5,))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpinfer.layout.prefill import PrefillSplit
from cpinfer.layout.shards import IntArray

# Starts of spans that are no slot: of a sequence that begins, and of one whose state another rank has to tell.
FRESH, OPEN = -1, -2


@dataclass(frozen=True)
class StatePlace:
    """Where the state of a sequence lies: a slot of one pcp rank."""

    pcp_rank: int
    slot: int


@dataclass(frozen=True)
class PromptStates:
    """Where a prompt's state is before a step, None where nothing comes before it, and where it goes behind it."""

    start: StatePlace | None
    ends: tuple[StatePlace, ...]


@dataclass(frozen=True)
class Span:
    """New tokens `[start, end)` of a prompt, all of those in a row that `pcp_rank` computes."""

    prompt: int
    start: int
    end: int
    pcp_rank: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Chain:
    """The states of one prompt, one behind the other, that this rank makes.

    `start`: the row of gathered states that it begins with, -1 for none. `links`: for each span the rows of gathered
    states and maps that are its B and M, the latter -1 where B alone is what comes out. `reads`: (link, own span) where
    the state before a link is what an own span has to be told. `slots`: where this rank keeps the state behind the
    last, and `tail [num_tail]` are the rows of gathered inputs that go with it.
    """

    start: int
    links: tuple[tuple[int, int], ...]
    reads: tuple[tuple[int, int], ...]
    slots: tuple[int, ...]
    tail: IntArray


@dataclass(frozen=True)
class StatePlan:
    """What one rank does in a prefill step; its tokens are packed span after span.

    `lens`: tokens of its spans. `starts`: for each the slot with its start, or `FRESH`, or `OPEN`. `tails [spans,
    num_tail]`: rows of gathered inputs that come before each span, -1 for zeros. `sent_inputs`, `sent_states`: slots
    whose inputs and whose states it sends behind those of its spans. `num_tails`, `num_states`, `num_maps`: how many of
    each a message has room for, as many as the rank with the most of them has.
    """

    lens: tuple[int, ...]
    starts: tuple[int, ...]
    tails: IntArray
    sent_inputs: tuple[int, ...]
    sent_states: tuple[int, ...]
    num_tails: int
    num_states: int
    num_maps: int
    chains: tuple[Chain, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lens)


def spans_of(split: PrefillSplit) -> tuple[tuple[Span, ...], ...]:
    """The spans of each prompt, in sequence order."""
    prompts = []
    for pieces in split.by_prompt:
        spans: list[Span] = []
        for piece in pieces:
            if spans and spans[-1].pcp_rank == piece.pcp_rank:
                spans[-1] = Span(piece.prompt, spans[-1].start, piece.end, piece.pcp_rank)
            else:
                spans.append(Span(piece.prompt, piece.start, piece.end, piece.pcp_rank))
        prompts.append(tuple(spans))
    return tuple(prompts)


def plan_states(split: PrefillSplit, prompts: Sequence[PromptStates], *, pcp_rank: int, num_tail: int) -> StatePlan:
    """Plan the step for the rank at `pcp_rank`; `num_tail` inputs come before a token in its convolution."""
    ranks = range(split.pcp_size)
    by_prompt = spans_of(split)
    own = [[span for spans in by_prompt for span in spans if span.pcp_rank == r] for r in ranks]
    is_open = {span: _is_open(span, prompts[span.prompt].start) for spans in by_prompt for span in spans}

    def started(on: int, *, elsewhere: bool) -> list[int]:
        """Prompts whose start lies on a rank: all, or those that begin `elsewhere`."""
        return [
            i for i, (states, spans) in enumerate(zip(prompts, by_prompt, strict=True))
            if states.start is not None and states.start.pcp_rank == on and (not elsewhere or is_open[spans[0]])
        ]  # fmt: skip

    inputs_of, states_of = [[started(r, elsewhere=where) for r in ranks] for where in (False, True)]
    num_tails = max(len(own[r]) + len(inputs_of[r]) for r in ranks)
    num_states = max(len(own[r]) + len(states_of[r]) for r in ranks)
    maps_of = [[span for span in own[r] if is_open[span]] for r in ranks]
    num_maps = max(map(len, maps_of))
    place_of = {span: i for r in ranks for i, span in enumerate(own[r])}
    map_of = {span: r * num_maps + i for r in ranks for i, span in enumerate(maps_of[r])}

    def inputs(rank: int, entry: int) -> list[int]:
        first = (rank * num_tails + entry) * num_tail
        return list(range(first, first + num_tail))

    tails: dict[Span, list[int]] = {}
    chains = []
    for i, (states, spans) in enumerate(zip(prompts, by_prompt, strict=True)):
        recent, start = [-1] * num_tail, -1
        if states.start is not None:
            r = states.start.pcp_rank
            recent = inputs(r, len(own[r]) + inputs_of[r].index(i))
            if is_open[spans[0]]:
                start = r * num_states + len(own[r]) + states_of[r].index(i)
        for span in spans:
            tails[span] = recent
            # What is sent of a shorter span stands at the end of its place in the message.
            newest = inputs(span.pcp_rank, place_of[span])[max(0, num_tail - span.num_tokens) :]
            recent = [*recent, *newest][len(newest) :]
        reads = [(j, place_of[s]) for j, s in enumerate(spans) if s.pcp_rank == pcp_rank and is_open[s]]
        slots = tuple(place.slot for place in states.ends if place.pcp_rank == pcp_rank)
        if reads or slots:
            links = [(s.pcp_rank * num_states + place_of[s], map_of.get(s, -1)) for s in spans]
            chains.append(Chain(start, tuple(links), tuple(reads), slots, np.array(recent, dtype=np.int64)))

    def slot_of(prompt: int) -> int:
        start = prompts[prompt].start
        return FRESH if start is None else start.slot

    mine = own[pcp_rank]
    return StatePlan(
        lens=tuple(span.num_tokens for span in mine),
        starts=tuple(OPEN if is_open[span] else slot_of(span.prompt) for span in mine),
        tails=np.array([tails[span] for span in mine], dtype=np.int64).reshape(len(mine), num_tail),
        sent_inputs=tuple(map(slot_of, inputs_of[pcp_rank])),
        sent_states=tuple(map(slot_of, states_of[pcp_rank])),
        num_tails=num_tails,
        num_states=num_states,
        num_maps=num_maps,
        chains=tuple(chains),
    )


def _is_open(span: Span, start: StatePlace | None) -> bool:
    """Whether the rank of a span does not know the state before it."""
    return span.start > 0 or (start is not None and start.pcp_rank != span.pcp_rank)
