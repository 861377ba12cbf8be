"""What a step takes on a machine, in seconds, and what these go to: a pure function of sizes and of a rank's rates.

What a rank does is added up; nothing is taken to overlap but, on a GPU, the host with its device:

    products     linear layers: FLOP at the rate of so many rows, or weights read, whichever takes longer
    attention    query-key pairs: FLOP, or bytes of keys, values and states read, whichever takes longer
    links        collectives: the latency of each, and the bytes that the rank receives (`step_traffic` counts them)
    host         what a step, a layer and a sequence cost whatever their size

Rates come from a machine's data sheet (`machines`) or from small measurements, none of them of a step to predict. The
exchange of decode states is the default, "a2a". All ranks of a layout wait for the slowest.

    n  ranks of a group    m  of them on one host    R  decode rows of a rank    T  new tokens of a rank

>>> from cpinfer.layout.capacity import KVLayout
>>> rates = Rates(((1, 4e14),), attention_flops=4e14, memory_bandwidth=2e12, link=Link(3e11, 1e-5))
>>> model = ModelSizes(num_layers=32, hidden_size=4096, vocab_size=32000, num_q_heads=32, num_kv_heads=8,
...     kv_head=KVLayout(1, 128, 128), layer_params=32 * 218_103_808, windows=(None,) * 32)
>>> for contexts in [1024] * 8, [262144] + [1024] * 7:  # on two lent ranks: in a home each, or over both
...     steps = [decode_step(model, RankGrid(pcp_size=2, dcp_size=dcp), rates, contexts) for dcp in (1, 2)]
...     print([(step.limit, round(step.seconds * 1e3, 1)) for step in steps])
[('products', 7.4), ('products', 8.0)]
[('attention', 24.3), ('attention', 16.6)]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from cpinfer.layout.grid import Group, RankGrid
from cpinfer.layout.shards import IntArray
from cpinfer.layout.step_traffic import (
    Axis,
    Kind,
    ModelSizes,
    Moved,
    PrefillWork,
    Widths,
    decode_moved,
    prefill_moved,
    seen_keys,
)

Part = Literal["products", "attention", "links", "host"]


@dataclass(frozen=True)
class Link:
    """How ranks reach each other: bytes per second that a rank receives, seconds of a tiny collective over two."""

    bandwidth: float
    latency_s: float


@dataclass(frozen=True)
class Rates:
    """What one rank does in a second while the others work beside it, and what a step costs however small it is.

    Attributes:
        product_flops: (rows, FLOP per second) of products of so many rows with the matrices of linear layers, rows
            ascending; in between it is interpolated, beyond them the nearest holds.
        attention_flops: FLOP per second of attention in prefill.
        memory_bandwidth: bytes per second of weights, keys, values and states read.
        link: between ranks of one host.
        network: between ranks of different hosts; None where there is one host.
        ranks_per_host: of a host, whose ranks follow each other; None where there is one host.
        decode_flops: FLOP per second of attention in decode; None as in prefill.
        step_s: the host's seconds of a step, whatever its size.
        layer_s: the host's seconds of a layer, beside what is counted elsewhere.
        row_s: the host's seconds of a sequence in a decode step (all ranks schedule all of them).
        exchange_s: the host's seconds of a decode layer whose states are exchanged, to pack and to merge them.
        host_overlaps: the host works ahead while its device computes, so that the longer of both counts.
    """

    product_flops: tuple[tuple[int, float], ...]
    attention_flops: float
    memory_bandwidth: float
    link: Link
    network: Link | None = None
    ranks_per_host: int | None = None
    decode_flops: float | None = None
    step_s: float = 0.0
    layer_s: float = 0.0
    row_s: float = 0.0
    exchange_s: float = 0.0
    host_overlaps: bool = False

    def product_s(self, rows: float, params: float, dtype_bytes: int) -> float:
        """Seconds of `rows` rows times matrices of `params` values; 0 for none of either."""
        if rows <= 0 or params <= 0:
            return 0.0
        at, flops = zip(*self.product_flops, strict=True)
        rate = float(np.exp(np.interp(np.log(rows), np.log(at), np.log(flops))))
        return max(2 * rows * params / rate, params * dtype_bytes / self.memory_bandwidth)

    def collective_s(self, groups: Sequence[Group], kind: Kind, num: int, received_bytes: float) -> float:
        """Seconds of `num` collectives that bring each rank `received_bytes` in all, over the worst of `groups`.

        Latency grows with the logarithm of n. Between hosts every rank has a port of its own. A block of a gather or a
        sum crosses once for all ranks of a host, which share it; messages of an all-to-all cross one by one.
        """
        return max(self._over(group, kind, num, received_bytes) for group in set(map(self._shape, groups)))

    def _shape(self, group: Group) -> tuple[int, int]:
        """n, and m of the host with the fewest."""
        hosts = Counter(rank // self.ranks_per_host if self.ranks_per_host else 0 for rank in group)
        return len(group), min(hosts.values())

    def _over(self, shape: tuple[int, int], kind: Kind, num: int, received_bytes: float) -> float:
        n, m = shape
        if n == 1:
            return 0.0
        hops = (n - 1).bit_length()
        if m == n or self.network is None:
            return num * hops * self.link.latency_s + received_bytes / self.link.bandwidth
        crossing = received_bytes * (n - m) / (n - 1) / (1 if kind == "all_to_all" else m)
        moving = max(received_bytes / self.link.bandwidth, crossing / self.network.bandwidth)
        return num * hops * self.network.latency_s + moving


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step, by what they go to; those of links by axis. `host_overlaps` as `Rates` has it."""

    products: float = 0.0
    attention: float = 0.0
    host: float = 0.0
    links_by_axis: Mapping[Axis, float] = field(default_factory=dict)
    host_overlaps: bool = False

    @property
    def links(self) -> float:
        """Of all axes."""
        return sum(self.links_by_axis.values())

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        device = self.products + self.attention + self.links
        return max(device, self.host) if self.host_overlaps else device + self.host

    @property
    def limit(self) -> Part:
        """The part that takes the longest."""
        parts: tuple[Part, ...] = get_args(Part)
        return max(parts, key=lambda part: float(getattr(self, part)))

    @property
    def busiest_axis(self) -> Axis | None:
        """The axis whose links take the longest; None where nothing travels."""
        return max(self.links_by_axis, key=lambda axis: self.links_by_axis[axis], default=None)

    def times(self, n: float) -> StepSeconds:
        """Of `n` steps like this one."""
        links = {axis: n * seconds for axis, seconds in self.links_by_axis.items()}
        return StepSeconds(n * self.products, n * self.attention, n * self.host, links, self.host_overlaps)

    def __add__(self, other: StepSeconds) -> StepSeconds:
        axes = {**self.links_by_axis, **other.links_by_axis}
        return StepSeconds(
            self.products + other.products,
            self.attention + other.attention,
            self.host + other.host,
            {axis: self.links_by_axis.get(axis, 0.0) + other.links_by_axis.get(axis, 0.0) for axis in axes},
            self.host_overlaps,
        )


def decode_step(
    model: ModelSizes,
    grid: RankGrid,
    rates: Rates,
    contexts: Sequence[int] | IntArray,
    widths: Widths = Widths(),
) -> StepSeconds:
    """One decode step, in which each running sequence of a replica computes its next token; at least one.

    `contexts`: tokens that each has cached. They are dealt over the replica's homes longest first, each to the home
    with the fewest keys, and the step is as long as that of the slowest home.
    """
    return max(
        (_home_step(model, grid, rates, home, len(contexts), widths) for home in deal(contexts, grid.num_homes)),
        key=lambda step: step.seconds,
    )


def prefill_step(
    model: ModelSizes,
    grid: RankGrid,
    rates: Rates,
    work: PrefillWork,
    widths: Widths = Widths(),
    workspace_tokens: int = 2**30,
) -> StepSeconds:
    """One prefill step. `workspace_tokens`: of what is cached, so many at most are gathered at a time."""
    tokens = max(1, *work.split.tokens_per_rank())
    sampled = sum(work.ends)
    return StepSeconds(
        products=_products_s(model, grid, rates, tokens, sampled, widths)
        + _expansion_s(model, grid, rates, work, tokens, widths),
        attention=_prefill_attention_s(model, grid, rates, work),
        links_by_axis=_links_s(
            grid, rates, prefill_moved(model, grid, work, widths, workspace_tokens=workspace_tokens)
        ),
        host=rates.step_s + model.num_layers * rates.layer_s,
        host_overlaps=rates.host_overlaps,
    )


def prefill(
    model: ModelSizes,
    grid: RankGrid,
    rates: Rates,
    prompt_lens: Sequence[int],
    step_tokens: int,
    widths: Widths = Widths(),
) -> StepSeconds:
    """All prompts of a replica, one after the other in steps of at most `step_tokens` tokens."""
    workspace_tokens = 2**30 if model.expanded_head is None else step_tokens  # expanded, latents are many times larger
    total = StepSeconds(host_overlaps=rates.host_overlaps)
    for (new, cached, ends), count in Counter(_steps_of(prompt_lens, step_tokens)).items():
        work = PrefillWork.of(new, cached, grid.pcp_size, ends)
        total += prefill_step(model, grid, rates, work, widths, workspace_tokens).times(count)
    return total


def _home_step(
    model: ModelSizes, grid: RankGrid, rates: Rates, home: IntArray, num_sequences: int, widths: Widths
) -> StepSeconds:
    """A decode step as the ranks of a home see it, which has a sequence, or others take longer."""
    rows = max(1, -(-len(home) // grid.row_ranks))
    exchanges = rates.exchange_s * len(model.windows) if grid.dcp_size > 1 else 0.0
    return StepSeconds(
        products=_products_s(model, grid, rates, rows, rows, widths),
        attention=_decode_attention_s(model, grid, rates, home, widths),
        links_by_axis=_links_s(grid, rates, decode_moved(model, grid, rows, widths)),
        host=rates.step_s + model.num_layers * rates.layer_s + num_sequences * rates.row_s + exchanges,
        host_overlaps=rates.host_overlaps,
    )


def deal(contexts: Sequence[int] | IntArray, num_homes: int) -> list[IntArray]:
    """Sequences of so many cached tokens over homes: longest first, each to the home with the fewest keys.

    >>> [home.tolist() for home in deal([1, 9, 2, 3], 2)]
    [[9], [3, 2, 1]]
    """
    homes: list[list[int]] = [[] for _ in range(num_homes)]
    if num_homes == 1:
        return [np.asarray(contexts, dtype=np.int64)]
    loads = [0] * num_homes
    for length in sorted(map(int, contexts), reverse=True):
        home = min(range(num_homes), key=lambda h: (loads[h], len(homes[h])))
        homes[home].append(length)
        loads[home] += length + 1
    return [np.array(home, dtype=np.int64) for home in homes]


def _steps_of(
    prompt_lens: Sequence[int], step_tokens: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]:
    """(new, cached, ends) of each step: the prompts in turn, what does not fit in a step goes on in the next."""
    new: list[int] = []
    cached: list[int] = []
    ends: list[bool] = []
    room = step_tokens
    for length in prompt_lens:
        done = 0
        while done < length:
            taken = min(room, length - done)
            new.append(taken)
            cached.append(done)
            done += taken
            ends.append(done == length)
            room -= taken
            if room == 0:
                yield tuple(new), tuple(cached), tuple(ends)
                new, cached, ends, room = [], [], [], step_tokens
    if new:
        yield tuple(new), tuple(cached), tuple(ends)


def _products_s(model: ModelSizes, grid: RankGrid, rates: Rates, rows: int, sampled_rows: int, widths: Widths) -> float:
    """Layers' matrices, cut over tp, experts among them, and the vocabulary's, of which every rank has a copy."""
    b, tp = widths.dtype, grid.tp_size
    seconds = rates.product_s(rows, model.layer_params / tp, b)
    seconds += rates.product_s(sampled_rows, model.vocab_size * model.hidden_size, b)
    if model.num_experts:
        k, num = model.experts_per_token, model.num_experts
        touched = num * (1 - (1 - k / num) ** rows)
        seconds += rates.product_s(rows * k / touched, touched * model.expert_params / tp, b)
    return seconds


def _expansion_s(
    model: ModelSizes, grid: RankGrid, rates: Rates, work: PrefillWork, tokens: int, widths: Widths
) -> float:
    """Of latents: every rank expands those of all ranks' tokens, its own among them, and of what is cached."""
    if model.expanded_head is None:
        return 0.0
    others = sum(work.new) - tokens + sum(work.cached)
    return rates.product_s(others, model.expand_params / grid.tp_size, widths.dtype)


def _decode_attention_s(model: ModelSizes, grid: RankGrid, rates: Rates, home: IntArray, widths: Widths) -> float:
    """Over one shard: all rows of a home, all query heads of the DCP group's columns, the heads that it stores."""
    heads = model.heads(grid)
    stored = model.kv_layout(heads.max_stored_heads(grid))
    keys = seen_keys(model, home) / grid.dcp_size
    flops = keys * grid.columns_per_dcp_group * heads.q_heads_per_rank * 2 * (stored.k_dim + stored.v_dim)
    num_bytes = keys * stored.values_per_token * widths.cache
    states = model.rank_states(grid)
    if states is not None:  # read and written, on the ranks that have the rows
        per_state = states.num_layers * states.state_values * 4
        num_bytes += -(-len(home) // grid.row_ranks) * 2 * per_state
    return max(flops / (rates.decode_flops or rates.attention_flops), num_bytes / rates.memory_bandwidth)


def _prefill_attention_s(model: ModelSizes, grid: RankGrid, rates: Rates, work: PrefillWork) -> float:
    heads = model.heads(grid)
    k_dim, v_dim = model.expanded_head or (model.kv_head.k_dim, model.kv_head.v_dim)
    per_pair = heads.q_heads_per_rank * 2 * (k_dim + v_dim)
    pairs = max(
        sum(
            layers * _pairs(work.cached[piece.prompt] + piece.start, work.cached[piece.prompt] + piece.end, window)
            for piece in work.split.part(rank)
            for window, layers in model.layers_of_window.items()
        )
        for rank in range(grid.pcp_size)
    )
    flops = float(pairs * per_pair)
    states = model.rank_states(grid)
    if states is not None:  # the rule over chunks: a read and a write of the state for each token
        tokens = max(work.split.tokens_per_rank())
        flops += 4.0 * states.num_layers * states.state_values * tokens
    return flops / rates.attention_flops


def _pairs(start: int, end: int, window: int | None) -> int:
    """Query-key pairs of the queries at positions `[start, end)`, each of which sees `window` keys at most.

    >>> _pairs(0, 4, None), _pairs(2, 4, None), _pairs(0, 4, 2), _pairs(2, 4, 2)
    (10, 7, 7, 4)
    """

    def below(position: int) -> int:
        free = position if window is None else min(position, window)
        return free * (free + 1) // 2 + (position - free) * (window or 0)

    return below(end) - below(start)


def _links_s(grid: RankGrid, rates: Rates, moved: Sequence[Moved]) -> dict[Axis, float]:
    seconds: dict[Axis, float] = {}
    for each in moved:
        took = rates.collective_s(groups_of(grid, each.axis), each.kind, each.num, each.received_bytes)
        seconds[each.axis] = seconds.get(each.axis, 0.0) + took
    return seconds


def groups_of(grid: RankGrid, axis: Axis) -> tuple[Group, ...]:
    """The ranks that meet along an axis."""
    of_axis = {"tp": grid.tp_groups, "pcp": grid.pcp_groups, "dcp": grid.dcp_groups, "replica": grid.replica_groups}
    return of_axis[axis]
