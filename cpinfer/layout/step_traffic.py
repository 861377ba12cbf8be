"""What a whole step moves: its collectives along each axis of the grid, all layers, in bytes that a rank receives.

The formulas of one layer are `traffic`'s and `context`'s; here they are put together as the engine calls them, so that
counted bytes are equal to these. All but those of tensor parallelism, whose all-reduces are the framework's: two per
layer, each of as much as a ring needs.

    R  decode rows of a rank    T  new tokens of a rank, padded to the most of all

>>> model = ModelSizes(num_layers=2, hidden_size=64, vocab_size=100, num_q_heads=4, num_kv_heads=2,
...     kv_head=KVLayout(1, 16, 16), layer_params=0, windows=(None, None))
>>> for moved in decode_moved(model, RankGrid(pcp_size=2, dcp_size=2), rows_per_rank=3, widths=Widths(4, 4, 4)):
...     print(moved.axis, moved.kind, moved.num, moved.received_bytes)
dcp gather 2 3072
dcp all_to_all 2 1632
replica gather 1 72
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cpinfer.layout.capacity import KVLayout, StateLayout
from cpinfer.layout.context import Context, StepContext, choose_exchange, exchange_bytes, exchange_places
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import PrefillSplit, StepCost, assign_prompts, zigzag_split
from cpinfer.layout.shards import IntArray, KVSharding
from cpinfer.layout.states import PromptStates, StatePlace, plan_states
from cpinfer.layout.traffic import decode_bytes, prefill_bytes, prefill_state_bytes

Axis = Literal["tp", "pcp", "dcp", "replica"]
Kind = Literal["gather", "all_to_all", "all_reduce"]

# Of the record of a token on which ranks agree: six numbers of 32 bits.
RECORD_BYTES = 24


@dataclass(frozen=True)
class ModelSizes:
    """What the cost of a step depends on of a model.

    Attributes:
        num_layers: all of them.
        hidden_size: values of a token between layers.
        vocab_size: logits of a row that samples.
        num_q_heads: query heads.
        num_kv_heads: the model's own; a latent is one.
        kv_head: what is cached of one of them.
        layer_params: values of the matrices in layers that each token passes, all layers together, experts left out.
        windows: of each layer with K and V, how many of the last tokens a query sees; None is all.
        num_experts: that a router chooses from, 0 without.
        experts_per_token: that it chooses.
        expert_params: values of the matrices of one expert, all layers together.
        expanded_head: of a latent, (key, value) widths of a head once it is expanded for prefill; None where the cache
            has what is attended to.
        expand_params: values of the matrices that expand a latent, all layers together; part of `layer_params`.
        max_absorbed_queries: of a latent, as `choose_exchange` has it.
        states: of layers of linear attention, None without.
        cuts_states: whether tensor parallelism divides their heads.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_q_heads: int
    num_kv_heads: int
    kv_head: KVLayout
    layer_params: int
    windows: tuple[int | None, ...]
    num_experts: int = 0
    experts_per_token: int = 0
    expert_params: int = 0
    expanded_head: tuple[int, int] | None = None
    expand_params: int = 0
    max_absorbed_queries: int | None = None
    states: StateLayout | None = None
    cuts_states: bool = True

    @property
    def active_params(self) -> int:
        """Values of matrices in layers that a token is multiplied with."""
        return self.layer_params + self.experts_per_token * self.expert_params

    @property
    def layers_of_window(self) -> Counter[int | None]:
        """How many layers with K and V have each window."""
        return Counter(self.windows)

    def heads(self, grid: RankGrid) -> HeadPlacement:
        """Its heads over the tp ranks of `grid`. ValueError where they cannot be dealt evenly."""
        return HeadPlacement(self.num_q_heads, self.num_kv_heads, grid.tp_size)

    def rank_states(self, grid: RankGrid) -> StateLayout | None:
        """What a rank of `grid` keeps of a sequence in layers of linear attention; None without these."""
        return None if self.states is None else self.states.over(grid.tp_size if self.cuts_states else 1)

    def kv_layout(self, num_heads: int) -> KVLayout:
        """What is cached of so many KV heads."""
        return replace(self.kv_head, num_heads=num_heads)


@dataclass(frozen=True)
class Widths:
    """Bytes per value: of weights and activations, of the cache, of partial outputs that travel."""

    dtype: int = 2
    cache: int = 2
    wire: int = 2


@dataclass(frozen=True)
class Moved:
    """`num` collectives of a kind along an axis, in which each rank receives `received_bytes` in all."""

    axis: Axis
    kind: Kind
    num: int
    received_bytes: int


@dataclass(frozen=True)
class PrefillWork:
    """A prefill step as its ranks see it: `cached[i]` tokens of prompt i stand before its new ones.

    `ends`: for each prompt, whether this is its last step, which samples.
    """

    split: PrefillSplit
    cached: tuple[int, ...]
    ends: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        new: Sequence[int],
        cached: Sequence[int],
        pcp_size: int,
        ends: Sequence[bool] | None = None,
        *,
        pairs_per_token: int = 4096,
    ) -> PrefillWork:
        """A step of `new` tokens of each prompt, split or dealt as the engine does; `pairs_per_token` of `StepCost`."""
        cost = StepCost(pairs_per_token=pairs_per_token)
        split = zigzag_split(new, pcp_size, assigned=assign_prompts(new, pcp_size, cost, cached))
        return cls(split, tuple(cached), tuple(ends or [True] * len(new)))

    @property
    def new(self) -> list[int]:
        """New tokens of each prompt."""
        return [sum(piece.num_tokens for piece in pieces) for pieces in self.split.by_prompt]

    def context(self, grid: RankGrid, sharding: KVSharding) -> StepContext:
        """What its prompts continue, dealt over the homes in turn."""
        contexts = [Context(n, i % grid.num_homes, ()) for i, n in enumerate(self.cached)]
        return StepContext(self.split, contexts, sharding, exchange_places(grid, 0))


def decode_moved(model: ModelSizes, grid: RankGrid, rows_per_rank: int, widths: Widths) -> tuple[Moved, ...]:
    """What a decode step moves by the exchange "a2a", of `rows_per_rank` rows on the rank with the most."""
    heads, layers = model.heads(grid), len(model.windows)
    per_layer = decode_bytes(
        dcp_size=grid.dcp_size,
        rows_per_rank=rows_per_rank,
        q_heads=heads.q_heads_per_rank,
        kv=model.kv_layout(heads.kv_heads_per_rank),
        dtype_bytes=widths.dtype,
        sends_new_kv=grid.pcp_size > 1 or heads.mixes_heads(grid),
        wire_bytes=widths.wire,
    )
    return _those_that_move(
        Moved("dcp", "gather", layers, layers * per_layer.gather),
        Moved("dcp", "all_to_all", layers, layers * per_layer.all_to_all),
        _all_reduces(model, grid, rows_per_rank, widths),
        Moved("replica", "gather", 1, (grid.ranks_per_replica - 1) * rows_per_rank * RECORD_BYTES),
    )


def prefill_moved(
    model: ModelSizes,
    grid: RankGrid,
    work: PrefillWork,
    widths: Widths,
    sharding: KVSharding | None = None,
    workspace_tokens: int = 2**30,
) -> tuple[Moved, ...]:
    """What a prefill step moves. What is before windows is gathered at once, whatever the `workspace_tokens`."""
    heads, split, layers = model.heads(grid), work.split, len(model.windows)
    axis: Axis = "dcp" if heads.mixes_heads(grid) else "pcp"
    places = grid.dcp_size if axis == "dcp" else grid.pcp_size
    new = prefill_bytes(places, split.part_len, model.kv_layout(heads.kv_heads_per_rank), widths.dtype)
    last = [pieces[-1].pcp_rank for pieces, ends in zip(split.by_prompt, work.ends, strict=True) if ends]
    num_sampled = max(Counter(last).values(), default=0)
    moved = [
        Moved(axis, "gather", layers, layers * new),
        _all_reduces(model, grid, max(1, *split.tokens_per_rank()), widths),
        *_states_moved(model, grid, work, widths),
    ]
    if any(work.cached):
        step = work.context(grid, sharding or KVSharding(grid.dcp_size, 16, 16))
        moved += _context_moved(model, grid, step, widths, workspace_tokens)
    if num_sampled:
        moved.append(Moved("replica", "gather", 1, (grid.ranks_per_replica - 1) * num_sampled * RECORD_BYTES))
    return _those_that_move(*moved)


def _context_moved(
    model: ModelSizes, grid: RankGrid, step: StepContext, widths: Widths, workspace_tokens: int
) -> Iterator[Moved]:
    heads = model.heads(grid)
    stored, places = model.kv_layout(heads.max_stored_heads(grid)), len(step.places)
    axis: Axis = "pcp" if grid.context_runs_over_pcp else "dcp"
    for window, layers in model.layers_of_window.items():
        held = np.array([_held_in_window(step, place, window) for place in range(places)])
        if window is not None:
            received = (places - 1) * int(held.max()) * stored.values_per_token * widths.dtype
            yield Moved(axis, "gather", layers, layers * received)
            continue
        choice = choose_exchange(step, heads.q_heads_per_rank, stored, widths.dtype, model.max_absorbed_queries)
        received = exchange_bytes(choice, step, heads.q_heads_per_rank, stored, widths.dtype)
        if choice == "kv":
            num = -(-int(held.max()) // max(1, workspace_tokens // places))
            yield Moved(axis, "gather", layers * num, layers * received)
            continue
        tokens = max(1, *step.split.tokens_per_rank())
        there = (places - 1) * tokens * heads.q_heads_per_rank * stored.k_dim * widths.dtype
        yield Moved(axis, "gather", layers, layers * there)
        yield Moved(axis, "all_to_all", layers, layers * (received - there))


def _held_in_window(step: StepContext, index: int, window: int | None) -> int:
    """Cached tokens of all prompts that a place holds, of those that a window's layers see."""
    here, place = step.held(index), step.places[index]
    if window is None:
        return int(here.sum())
    ends = np.array([context.num_tokens for context in step.contexts], dtype=np.int64)
    before = step.sharding.local_len(np.maximum(0, ends - (window - 1)), place.shard)
    return int(np.where(here > 0, here - before, 0).sum())


def _states_moved(model: ModelSizes, grid: RankGrid, work: PrefillWork, widths: Widths) -> Iterator[Moved]:
    """Of layers of linear attention; every sequence's state is taken to lie on the first rank of its home."""
    states = model.rank_states(grid)
    if states is None:
        return
    places = [StatePlace(i % grid.num_homes * grid.row_ranks, i) for i in range(len(work.cached))]
    prompts = [PromptStates(place if n else None, (place,)) for place, n in zip(places, work.cached, strict=True)]
    plan = plan_states(work.split, prompts, pcp_rank=0, num_tail=states.num_tail)
    received = prefill_state_bytes(grid.pcp_size, plan, states, widths.dtype)
    yield Moved("pcp", "gather", 2 * states.num_layers, states.num_layers * received)


def _all_reduces(model: ModelSizes, grid: RankGrid, rows: int, widths: Widths) -> Moved:
    """Two per layer, of the hidden states of so many rows, as a ring receives them."""
    num, tp = 2 * model.num_layers, grid.tp_size
    return Moved("tp", "all_reduce", num, num * 2 * (tp - 1) * rows * model.hidden_size * widths.dtype // tp)


def _those_that_move(*moved: Moved) -> tuple[Moved, ...]:
    """Axes of one rank move nothing, and have no collectives."""
    return tuple(each for each in moved if each.received_bytes)


def seen_keys(model: ModelSizes, contexts: IntArray) -> float:
    """Keys that one query behind each of `contexts` cached tokens sees, its own included, summed over layers."""
    seen = contexts + 1
    return float(sum(n * (seen if w is None else np.minimum(seen, w)).sum() for w, n in model.layers_of_window.items()))
