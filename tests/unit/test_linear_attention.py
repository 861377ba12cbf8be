"""Linear attention in steps on ranks as threads: chunks, forks and decode, against whole sequences token by token."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import conv1d

from cpinfer.attention import linear_attention
from cpinfer.attention.linear_attention import DecodeStates, LinearLayer, PrefillStates
from cpinfer.comm.axis import CountingComm, SoloComm
from cpinfer.comm.threads import run_ranks
from cpinfer.kv_cache.state_store import StateStore
from cpinfer.layout.capacity import StateLayout
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.states import PromptStates, StatePlace, plan_states
from cpinfer.layout.traffic import prefill_state_bytes
from cpinfer.ops.delta_rule import DeltaTokens
from reference_delta_rule import delta_rule

CPU = torch.device("cpu")
LAYOUT = StateLayout(num_layers=2, num_k_heads=2, num_v_heads=4, k_dim=5, v_dim=3, conv_width=4)
LAYERS = (1, 4)
C, W, SIZES = LAYOUT.num_channels, LAYOUT.conv_width, (2 * 5, 2 * 5, 4 * 3)
TOLERANCE = 2e-6
# Tokens of each prompt in two chunks, of which the second may be all; and what is decoded behind them, in two samples.
CHUNKS = [(6, 5), (0, 1), (1, 2), (0, 70), (66, 1)]
NUM_DECODED = 3


class World:
    """Two layers' inputs, decays and rates of all tokens of all prompts, and what the layers make of them."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.weights = {layer: torch.randn(C, 1, W, generator=g) for layer in LAYERS}
        lens = [sum(chunks) + NUM_DECODED for chunks in CHUNKS]
        self.x = {layer: [torch.randn(n, C, generator=g) for n in lens] for layer in LAYERS}
        self.g = {layer: [-0.3 * torch.rand(n, 4, generator=g) for n in lens] for layer in LAYERS}
        self.beta = {layer: [torch.rand(n, 4, generator=g) for n in lens] for layer in LAYERS}

    def layer(self, index):
        def convolve(x):
            return conv1d(x, self.weights[index].to(x.dtype), padding=W - 1, groups=C)[..., : x.shape[-1]].tanh()

        return LinearLayer(index, convolve, delta_rule, delta_rule)

    def run(self, step, index, tokens):
        """What `step` makes of (prompt, position) in a layer, with one row more that nobody reads."""
        x, g, beta = (
            torch.cat([torch.stack([part[p][t] for p, t in tokens]), torch.full((1, part[0].shape[1]), torch.nan)])
            if tokens
            else torch.full((1, part[0].shape[1]), torch.nan)
            for part in (self.x[index], self.g[index], self.beta[index])
        )
        layer = self.layer(index)
        q, k, v = step.convolve(layer, x).split(SIZES, dim=-1)
        out = step.recur(
            layer, DeltaTokens(q.unflatten(1, (2, 5)), k.unflatten(1, (2, 5)), v.unflatten(1, (4, 3)), g, beta)
        )
        assert len(out) == len(tokens) + 1
        return out[: len(tokens)]

    def whole(self, index, prompt):
        """Every token of a prompt, in float64."""
        x, g, beta = (part[index][prompt].double() for part in (self.x, self.g, self.beta))
        q, k, v = self.layer(index).convolve(x.T[None])[0].T.split(SIZES, dim=-1)
        q, k, v = q.unflatten(1, (2, 5))[None], k.unflatten(1, (2, 5))[None], v.unflatten(1, (4, 3))[None]
        return delta_rule(q, k, v, g=g[None], beta=beta[None], initial_state=g.new_zeros(1, 4, 5, 3))[0][0]


def largest_error(pcp_size, assigned=None):
    """Of all outputs of all layers in two chunks and decode steps of two samples, on ranks that hold some states."""
    world = World()
    wanted = {(layer, p): world.whole(layer, p) for layer in LAYERS for p in range(len(CHUNKS))}
    places = [[StatePlace((p + s) % pcp_size, 2 * p + s) for s in range(2)] for p in range(len(CHUNKS))]

    def body(topology):
        r, errors = topology.coords.pcp_rank, [0.0]
        store = StateStore(LAYOUT, LAYERS, 2 * len(CHUNKS), torch.float32, CPU)
        for layer in LAYERS:  # what a slot held before is nobody's business
            every = torch.arange(store.num_slots)
            store.write_states(layer, every, torch.full((4, 5, 3), 7.0))
            store.write_inputs(layer, every, torch.full((W - 1, C), 7.0))

        def check(step, tokens):
            for layer in LAYERS:
                for (prompt, at), out in zip(tokens, world.run(step, layer, tokens), strict=True):
                    errors.append(float((out - wanted[layer, prompt][at]).abs().max()))

        for number in range(2):
            prompts = [p for p, chunks in enumerate(CHUNKS) if chunks[number]]
            begin = [sum(CHUNKS[p][:number]) for p in prompts]
            lens = [CHUNKS[p][number] for p in prompts]
            ends = [
                PromptStates(places[p][0] if first else None, tuple(places[p]))
                for p, first in zip(prompts, begin, strict=True)
            ]
            split = zigzag_split(lens, pcp_size, assigned=assigned and [assigned[p] for p in prompts])
            plan = plan_states(split, ends, pcp_rank=r, num_tail=LAYOUT.num_tail)
            tokens = [(prompts[x.prompt], begin[x.prompt] + t) for x in split.part(r) for t in range(x.start, x.end)]
            check(PrefillStates(plan, store, topology.pcp), tokens)
        own = [(p, place.slot) for p, both in enumerate(places) for place in both if place.pcp_rank == r]
        for i in range(NUM_DECODED):
            check(DecodeStates([slot for _, slot in own], store), [(p, sum(CHUNKS[p]) + i) for p, _ in own])
        return max(errors)

    return max(run_ranks(RankGrid(pcp_size=pcp_size), body))


@pytest.mark.parametrize("pcp_size", [1, 2, 3, 4])
def test_chunks_forks_and_decode_give_every_token_what_the_whole_sequence_gives_it(pcp_size):
    assert largest_error(pcp_size) <= TOLERANCE


def test_prompts_that_are_whole_on_other_ranks_than_their_states_are_as_right():
    assert largest_error(3, [2, None, 1, 0, None]) <= TOLERANCE


def _changed(plan, **changes):
    return dataclasses.replace(plan, **changes)


FAULTS = {
    "another order": lambda plan: _changed(
        plan, chains=tuple(_changed(c, links=(c.links[0], *c.links[:0:-1])) for c in plan.chains)
    ),
    "a dropped tail": lambda plan: _changed(plan, tails=np.full_like(plan.tails, -1)),
    "inputs of another place": lambda plan: _changed(
        plan, chains=tuple(_changed(c, tail=np.roll(c.tail, 1)) for c in plan.chains)
    ),
    "the state of another row": lambda plan: _changed(
        plan, chains=tuple(_changed(c, slots=tuple(s ^ 1 for s in c.slots)) for c in plan.chains)
    ),
    "no past": lambda plan: _changed(plan, chains=tuple(_changed(c, reads=()) for c in plan.chains)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_put_wrong_on_purpose_shows_in_the_outputs(monkeypatch, fault):
    made = PrefillStates.__init__
    monkeypatch.setattr(PrefillStates, "__init__", lambda self, plan, *rest: made(self, FAULTS[fault](plan), *rest))
    assert largest_error(2) > 1000 * TOLERANCE


def test_a_read_of_a_past_that_is_not_added_shows_too(monkeypatch):
    monkeypatch.setattr(linear_attention, "read_past", lambda read, start: torch.zeros(()))
    assert largest_error(2) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_receives_as_many_bytes_as_the_formula_says_for_1k_tokens_and_for_32k(dtype):
    def rule(query, key, value, *, initial_state, **_):
        return torch.zeros_like(value), initial_state

    layer = LinearLayer(4, lambda x: x, rule, rule)

    def received(n):
        split = zigzag_split([n], 2)

        def body(topology):
            r = topology.coords.pcp_rank
            plan = plan_states(split, [PromptStates(None, (StatePlace(1, 0),))], pcp_rank=r, num_tail=LAYOUT.num_tail)
            comm = CountingComm(topology.pcp)
            step = PrefillStates(plan, StateStore(LAYOUT, LAYERS, 1, dtype, CPU), comm)
            T = step.num_tokens
            q, k, v = step.convolve(layer, torch.zeros(T, C, dtype=dtype)).split(SIZES, dim=-1)
            g, beta = torch.zeros(T, 4), torch.zeros(T, 4)
            step.recur(layer, DeltaTokens(q.view(T, 2, 5), k.view(T, 2, 5), v.view(T, 4, 3), g, beta))
            assert comm.traffic.num_collectives == 2
            assert comm.traffic.received_bytes == prefill_state_bytes(2, plan, LAYOUT, dtype.itemsize)
            return comm.traffic.received_bytes

        return run_ranks(RankGrid(pcp_size=2), body)

    # Two spans' inputs; two states and one map of them.
    assert received(1024) == received(32768) == [2 * 3 * C * dtype.itemsize + 4 * (2 * 4 * 5 * 3 + 4 * 5 * 5)] * 2


def test_the_rule_keeps_its_own_precision_inside_autocast():
    seen = []

    def rule(query, key, value, *, initial_state, **_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros_like(value), initial_state

    layer, store = LinearLayer(4, lambda x: x, rule, rule), StateStore(LAYOUT, LAYERS, 1, torch.bfloat16, CPU)
    plan = plan_states(zigzag_split([1], 1), [PromptStates(None, (StatePlace(0, 0),))], pcp_rank=0, num_tail=3)
    tokens = DeltaTokens(*(torch.zeros(1, *shape) for shape in ((2, 5), (2, 5), (4, 3), (4,), (4,))))
    with torch.autocast("cpu", torch.bfloat16):
        PrefillStates(plan, store, SoloComm()).recur(layer, tokens)
        DecodeStates([0], store).recur(layer, tokens)
    assert seen == [False, False]


def test_a_rank_without_rows_makes_nothing_of_its_dummy():
    world = World()
    step = DecodeStates([], StateStore(LAYOUT, LAYERS, 1, torch.float32, CPU))
    assert step.num_tokens == 0
    assert world.run(step, 4, []).shape == (0, 4, 3)
