"""Plans for states of linear attention, run by all ranks over what stands for states: the tokens that made them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.states import FRESH, OPEN, PromptStates, Span, StatePlace, plan_states, spans_of

NUM_TAIL = 3


def run(lens, pcp_size, prompts, assigned=None, change=lambda plan: plan):
    """What every rank finds before its spans, in states and in inputs, and keeps behind prompts: all, as tokens.

    A state is the tokens that made it, in order; token t of prompt p is (p, t), those before the step are negative.
    """
    split = zigzag_split(lens, pcp_size, assigned=assigned)
    ranks = range(pcp_size)
    plans = [change(plan_states(split, prompts, pcp_rank=r, num_tail=NUM_TAIL)) for r in ranks]
    own = [[s for spans in spans_of(split) for s in spans if s.pcp_rank == r] for r in ranks]
    kept = [{} for _ in ranks]  # by slot: the state that lies there, and the inputs
    for i, states in enumerate(prompts):
        if states.start is not None:
            past = tuple((i, t) for t in range(-5, 0))
            kept[states.start.pcp_rank][states.start.slot] = (past, past[-NUM_TAIL:])

    def tokens(span):
        return tuple((span.prompt, t) for t in range(span.start, span.end))

    inputs, states, maps = [], [], []
    for plan, spans, slots in zip(plans, own, kept, strict=True):
        assert plan.lens == tuple(s.num_tokens for s in spans)
        sent = [((None,) * NUM_TAIL + tokens(s))[-NUM_TAIL:] for s in spans]
        sent += [slots[slot][1] for slot in plan.sent_inputs]
        inputs += sent + [("unused",) * NUM_TAIL] * (plan.num_tails - len(sent))
        ends = [
            (slots[start][0] if start >= 0 else ()) + tokens(s) for s, start in zip(spans, plan.starts, strict=True)
        ]
        ends += [slots[slot][0] for slot in plan.sent_states]
        states += ends + ["unused"] * (plan.num_states - len(ends))
        is_open = [start == OPEN for start in plan.starts]
        maps += [True] * sum(is_open) + ["unused"] * (plan.num_maps - sum(is_open))
    flat = [x for tail in inputs for x in tail]

    def of(rows):
        return tuple(None if row < 0 else flat[row] for row in rows)

    found = []
    for plan, spans in zip(plans, own, strict=True):
        before, ends, tails = {}, {}, {}
        for chain in plan.chains:
            state = states[chain.start] if chain.start >= 0 else None
            reads = dict(chain.reads)
            for j, (row, through) in enumerate(chain.links):
                if j in reads:
                    before[spans[reads[j]]] = state
                if through >= 0:
                    assert maps[through] is True
                    state = state + states[row]
                else:
                    state = states[row]
            for slot in chain.slots:
                ends[slot] = state
                tails[slot] = of(chain.tail)
        for s, start in zip(spans, plan.starts, strict=True):
            assert (start == OPEN) == (s in before)
        found.append((before, {s: of(rows) for s, rows in zip(spans, plan.tails, strict=True)}, ends, tails))
    return split, found


def check(lens, pcp_size, prompts, assigned=None, change=lambda plan: plan):
    split, found = run(lens, pcp_size, prompts, assigned, change)
    whole = [
        tuple((i, t) for t in range(-5 if states.start else 0, n))
        for i, (n, states) in enumerate(zip(lens, prompts, strict=True))
    ]

    def tail(prompt, at):
        """Inputs before a place: of the tokens, and zeros before the first."""
        past = [x for x in whole[prompt] if x[1] < at]
        return tuple([None] * NUM_TAIL + past)[-NUM_TAIL:]

    for rank, (before, tails, ends, end_tails) in enumerate(found):
        for span, state in before.items():
            assert state == tuple(x for x in whole[span.prompt] if x[1] < span.start)
        for span, inputs in tails.items():
            assert inputs == tail(span.prompt, span.start)
        wanted = {p.slot: i for i, states in enumerate(prompts) for p in states.ends if p.pcp_rank == rank}
        assert ends == {slot: whole[i] for slot, i in wanted.items()}
        assert end_tails == {slot: tail(i, lens[i]) for slot, i in wanted.items()}
    assert sum(len(tails) for _, tails, _, _ in found) == sum(map(len, spans_of(split)))


@st.composite
def steps(draw):
    pcp_size = draw(st.integers(1, 5))
    lens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    place = st.integers(0, pcp_size - 1)
    prompts = []
    for i in range(len(lens)):
        start = StatePlace(draw(place), 10 * i) if draw(st.booleans()) else None
        ends = tuple(StatePlace(draw(place), 10 * i + j) for j in range(draw(st.integers(0, 3))))
        prompts.append(PromptStates(start, ends))
    assigned = draw(st.lists(st.one_of(st.none(), place), min_size=len(lens), max_size=len(lens)))
    return lens, pcp_size, prompts, assigned


@given(steps())
def test_every_rank_finds_the_states_and_inputs_of_the_whole_sequence(step):
    check(*step)


SPLIT = ([9, 2, 30], 2, [PromptStates(StatePlace(1, 0), (StatePlace(0, 3), StatePlace(1, 0)))] * 3, [None, 1, None])
SPLIT[2][1:] = [PromptStates(None, (StatePlace(0, 7),)), PromptStates(StatePlace(0, 8), (StatePlace(0, 8),))]


def test_the_step_of_the_negative_controls_is_right_as_it_is():
    check(*SPLIT)


def _swapped(plan):
    """A composition in another order."""
    chains = [dataclasses.replace(c, links=(c.links[0], *c.links[:0:-1])) for c in plan.chains]
    return dataclasses.replace(plan, chains=tuple(chains))


def _dropped_tail(plan):
    return dataclasses.replace(plan, tails=np.full_like(plan.tails, -1))


def _other_slot(plan):
    return dataclasses.replace(plan, chains=tuple(dataclasses.replace(c, slots=(99,)) for c in plan.chains))


@pytest.mark.parametrize("fault", [_swapped, _dropped_tail, _other_slot])
def test_what_is_put_wrong_on_purpose_is_found(fault):
    with pytest.raises(AssertionError):
        check(*SPLIT, change=fault)


def test_pieces_in_a_row_on_one_rank_are_one_span():
    assert spans_of(zigzag_split([8, 1], 2)) == (
        (Span(0, 0, 2, 0), Span(0, 2, 6, 1), Span(0, 6, 8, 0)),
        (Span(1, 0, 1, 0),),
    )


def test_one_rank_knows_every_start_and_has_nothing_to_send_of_others():
    prompts = [PromptStates(None, (StatePlace(0, 1),)), PromptStates(StatePlace(0, 2), (StatePlace(0, 2),))]
    plan = plan_states(zigzag_split([70, 3], 1), prompts, pcp_rank=0, num_tail=NUM_TAIL)
    assert plan.starts == (FRESH, 2)
    assert (plan.num_tails, plan.num_states, plan.num_maps) == (3, 2, 0)
    assert plan.sent_states == ()


def test_messages_do_not_grow_with_the_sequence():
    def sizes(n):
        plan = plan_states(zigzag_split([n], 4), [PromptStates(None, (StatePlace(3, 0),))], pcp_rank=2, num_tail=3)
        return plan.num_tails, plan.num_states, plan.num_maps

    assert sizes(1024) == sizes(32768) == (2, 2, 2)


def test_a_rank_without_tokens_has_a_plan_that_takes_part():
    plan = plan_states(zigzag_split([1], 4), [PromptStates(None, (StatePlace(2, 4),))], pcp_rank=2, num_tail=3)
    assert (plan.lens, plan.starts, plan.tails.shape) == ((), (), (0, 3))
    assert plan.chains[0].slots == (4,)
