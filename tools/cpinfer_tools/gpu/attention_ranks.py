"""Ranks as threads: prefill and decode of a few sequences on random q, k, v, against dense attention in float64.

The tests run it on CPU, `gpu_check.py` on a GPU, which then plays all ranks.

One "layer" is enough: what a layout can get wrong (ownership, order, masks, merges) does not depend on depth. Query and
KV heads are those of a whole model; each rank takes the slice that tensor parallelism would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend
from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.attention.context import ContextAttention, KVContext, QueryContext, WindowContext
from cpinfer.attention.exchanges.registry import EXCHANGES
from cpinfer.attention.layer import AttentionLayer, LatentLayer
from cpinfer.attention.steps import DecodeStep, PrefillStep
from cpinfer.comm.axis import CountingComm, Traffic
from cpinfer.comm.threads import run_ranks
from cpinfer.comm.topology import Topology
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import (
    Context,
    Exchange,
    StepContext,
    exchange_places,
    plan_kv_exchange,
    plan_query_exchange,
    plan_window_exchange,
)
from cpinfer.layout.decode import plan_decode, rows_in_window
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import GroupHeads, HeadPlacement
from cpinfer.layout.prefill import PrefillPlan, PrefillSplit, assign_prompts, plan_prefill, zigzag_split
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import KVSharding
from cpinfer.models.spec import LatentDims
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.states import State, merge_states

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One layout on one set of sequences. `peaked` logits have std 3 and a sink key; flat ones hardly differ."""

    grid: RankGrid
    num_q_heads: int
    num_kv_heads: int
    prompt_lens: Sequence[int]
    interleave: int = 16
    block_size: int = 4
    page_size: int = 1
    num_new_tokens: int = 3
    head_dim: int = 8
    peaked: bool = True
    whole_prompts: bool = False
    # Prefill in chunks of so many tokens; None is all at once.
    chunk: int | None = None
    context_exchange: Exchange = "queries"
    context_workspace_tokens: int = 65536
    decode_exchange: str = "a2a"
    window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False
    # Heads whose keys and values are maps of one latent: one KV head, and the other sizes instead of `head_dim`.
    latent: LatentDims | None = None
    # Of queries, keys and values; states travel in float32.
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    @property
    def sinks(self) -> Tensor | None:
        """One logit per query head, of the size of those of keys."""
        if not self.with_sinks:
            return None
        return 3 * torch.randn(self.num_q_heads, generator=torch.Generator().manual_seed(3)).to(self.device)

    @property
    def q_dim(self) -> int:
        """Of a query of one head."""
        latent = self.latent
        return self.head_dim if latent is None else latent.qk_nope_head_dim + latent.qk_rope_head_dim

    def cache_layout(self, num_heads: int) -> KVLayout:
        """Of what a rank stores that has so many KV heads."""
        latent = self.latent
        if latent is None:
            return KVLayout(num_heads, self.head_dim, self.head_dim)
        width = latent.kv_lora_rank + latent.qk_rope_head_dim
        return KVLayout(1, width, latent.kv_lora_rank, v_is_prefix_of_k=True)

    def layer(self, q_heads: Sequence[int]) -> AttentionLayer:
        """As these query heads see it."""
        heads, scale = list(q_heads), self.q_dim**-0.5
        sinks = None if self.sinks is None else self.sinks[heads]
        if self.latent is None:
            return AttentionLayer(0, scale, self.soft_cap, self.window, sinks)
        generator = torch.Generator().manual_seed(5)
        w_k, w_v = (
            torch.randn(self.num_q_heads, n, self.latent.kv_lora_rank, generator=generator)
            * self.latent.kv_lora_rank**-0.5
            for n in (self.latent.qk_nope_head_dim, self.latent.v_head_dim)
        )
        w_k, w_v = (w.to(self.dtype)[heads].to(self.device) for w in (w_k, w_v))
        return LatentLayer(0, scale, self.soft_cap, self.window, sinks, w_k=w_k, w_v=w_v)

    def home(self, sequence: int) -> int:
        """Sequences are dealt to homes one after another."""
        return sequence % self.grid.num_homes


@dataclass(frozen=True)
class Tampering:
    """Ways to be wrong, each the identity here; negative controls replace one."""

    backend: Callable[[AttentionBackend], AttentionBackend] = lambda backend: backend
    topology: Callable[[Topology], Topology] = lambda topology: topology
    plan: Callable[[PrefillPlan], PrefillPlan] = lambda plan: plan
    shard: Callable[[Topology], int] = lambda topology: topology.kv_shard
    heads: Callable[[GroupHeads], GroupHeads] = lambda heads: heads
    oracle: Callable[[Case], Case] = lambda case: case


@dataclass
class Outcome:
    """What a case showed: the worst error, and what each rank received in prefill and per decode step."""

    max_error: float
    prefill_traffic: list[Traffic] = field(default_factory=list)
    decode_traffic: list[Traffic] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """Attention output that one rank computed: of a sequence, at these positions, for these query heads."""

    sequence: int
    positions: range
    q_heads: range
    out: Tensor


def run_case(case: Case, tampering: Tampering = Tampering()) -> Outcome:
    """Prefill the prompts, then decode `num_new_tokens`, on every rank; compare all of it with the oracle."""
    inputs = [_inputs(case, length + case.num_new_tokens, seed) for seed, length in enumerate(case.prompt_lens)]
    tables, num_blocks = _block_tables(case)
    ranks = run_ranks(
        case.grid, lambda topology: _run_rank(case, tampering, tampering.topology(topology), inputs, tables, num_blocks)
    )
    oracle = []
    truth = tampering.oracle(case)
    layer = truth.layer(range(case.num_q_heads)).to(torch.float64)
    for qkv in inputs:
        q, k, v = (x.double() for x in qkv)
        k, v = layer.expand(k, v)
        out, lse = dense_attention(
            q, k, v, scale=layer.scale, causal=True, window=truth.window, soft_cap=truth.soft_cap
        )
        oracle.append(out if truth.sinks is None else merge_states([(out, lse), _sink_states(out, truth.sinks)])[0])
    seen = [torch.zeros(x.shape[:2], device=case.device) for x in oracle]
    worst = 0.0
    for parts, _, _ in ranks:
        for part in parts:
            where = (torch.tensor(list(part.positions))[:, None], torch.tensor(list(part.q_heads))[None, :])
            error = (oracle[part.sequence][where] - part.out).abs().max().item()
            # max() would pass over a NaN.
            worst = error if error != error else max(worst, error)
            seen[part.sequence][where] += 1
    # Rows are dealt over pcp and heads over tp, so every (position, head) is computed once; replicated rows by all.
    for count, length in zip(seen, case.prompt_lens, strict=True):
        assert (count[:length] == 1).all()
        assert (count[length:] == (case.grid.row_ranks // EXCHANGES[case.decode_exchange].row_ranks(case.grid))).all()
    return Outcome(worst, [prefill for _, prefill, _ in ranks], [decode for _, _, decode in ranks])


def _sink_states(out: Tensor, sinks: Tensor) -> State:
    """What every query sees besides keys: nothing, with a logit of its own."""
    return torch.zeros_like(out), sinks.double().expand(out.shape[:2])


def _run_rank(
    case: Case,
    tampering: Tampering,
    topology: Topology,
    inputs: list[tuple[Tensor, Tensor, Tensor]],
    tables: list[list[int]],
    num_blocks: int,
) -> tuple[list[_Part], Traffic, Traffic]:
    grid, coords = case.grid, topology.coords
    placement = HeadPlacement(case.num_q_heads, case.num_kv_heads, grid.tp_size)
    q_heads, kv_heads = placement.q_heads(coords.tp_rank), placement.kv_heads(coords.tp_rank)
    stored = tampering.heads(placement.in_group(grid, coords.tp_rank))
    layer = case.layer(q_heads)
    sharding = KVSharding(grid.dcp_size, case.interleave, case.block_size)
    shard = tampering.shard(topology)
    cache = PagedKVCache(
        case.cache_layout(len(stored.kv_heads)),
        1,
        num_blocks,
        case.block_size,
        case.dtype,
        case.device,
    )
    backend = tampering.backend(TorchBackend(case.device))
    pcp, dcp = CountingComm(topology.pcp), CountingComm(topology.dcp)
    prefill_comm = dcp if stored.is_mixed else pcp
    parts: list[_Part] = []

    def heads_of(tokens: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = tokens
        return q[:, list(q_heads)], k[:, list(kv_heads)], v[:, list(kv_heads)]

    def pack(where: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of `[start, end)` of sequences, packed; one token of the first sequence where there are none."""
        where = where or [(0, 0, 1)]
        return heads_of(tuple(torch.cat([inputs[i][j][a:b] for i, a, b in where]) for j in range(3)))  # type: ignore[arg-type]

    home = grid.home(topology.rank)
    places = exchange_places(grid, topology.rank)
    context_comm = pcp if grid.context_runs_over_pcp else dcp
    own_tables = [table if case.home(i) == home else None for i, table in enumerate(tables)]

    def continued(split: PrefillSplit, starts: list[int], which: list[int]) -> StepContext:
        contexts = [Context(start, case.home(i), tables[i]) for start, i in zip(starts, which, strict=True)]
        return StepContext(split, contexts, sharding, places)

    def context_of(step: StepContext) -> ContextAttention:
        if case.context_exchange == "queries":
            exchange = EXCHANGES["a2a"](context_comm, pcp_size=grid.pcp_size, wire_dtype=torch.float32)
            plan = plan_query_exchange(step, context_comm.index)
            return QueryContext(plan, backend, cache, exchange, stored)
        kv_plan = plan_kv_exchange(step, context_comm.index, case.context_workspace_tokens)
        return KVContext(kv_plan, backend, cache, context_comm, stored)

    chunk = case.chunk or max(case.prompt_lens)
    for begin in range(0, max(case.prompt_lens), chunk):
        # A prompt that ends in an earlier chunk takes no part; of the others some have context and some begin here.
        which = [i for i, length in enumerate(case.prompt_lens) if length > max(0, begin - i % 2 * chunk // 2)]
        starts = [max(0, begin - i % 2 * (chunk // 2)) for i in which]
        ends = [min(case.prompt_lens[i], begin + chunk - i % 2 * (chunk // 2)) for i in which]
        if begin + chunk >= max(case.prompt_lens):
            ends = [case.prompt_lens[i] for i in which]
        lens = [end - start for start, end in zip(starts, ends, strict=True)]
        assigned = assign_prompts(lens, grid.pcp_size, context_lens=starts) if case.whole_prompts else None
        split = zigzag_split(lens, grid.pcp_size, page_size=case.page_size, assigned=assigned)
        plan = plan_prefill(
            split,
            [own_tables[i] for i in which],
            sharding,
            pcp_rank=coords.pcp_rank,
            shard=shard,
            context_lens=starts,
        )
        plan = tampering.plan(plan)
        rows: dict[int | None, AttentionRows] = {None: plan.rows}
        if case.window is not None:
            rows = {case.window: plan.rows.within(case.window)}
        context: ContextAttention | None = None
        window_contexts: dict[int | None, WindowContext] = {}
        if any(starts) and case.window is None:
            context = context_of(continued(split, starts, which))
        elif any(starts) and case.window is not None:
            seen = plan_window_exchange(continued(split, starts, which), context_comm.index, case.window)
            rows = {}
            window_contexts[case.window] = WindowContext([seen], backend, cache, context_comm, stored)
        prefill = PrefillStep(plan, rows, backend, cache, prefill_comm, stored, context, window_contexts)
        spans = [(which[p.prompt], starts[p.prompt] + p.start, starts[p.prompt] + p.end) for p in plan.pieces]
        out = prefill.attend(layer, *pack(spans))
        row = 0
        for i, start, end in spans:
            parts.append(_Part(i, range(start, end), q_heads, out[row : row + end - start]))
            row += end - start
    prefill_traffic = replace(prefill_comm.traffic)
    dcp.traffic = Traffic()

    of_decode = EXCHANGES[case.decode_exchange]
    row_ranks = of_decode.row_ranks(grid)
    exchange = of_decode(dcp, pcp_size=row_ranks, wire_dtype=torch.float32, kv_columns=stored.columns)
    here = [i for i in range(len(case.prompt_lens)) if case.home(i) == home]
    for step in range(case.num_new_tokens if here else 0):
        positions = [case.prompt_lens[i] + step for i in here]
        decode_plan = plan_decode(
            positions,
            [tables[i] for i in here],
            sharding,
            pcp_size=row_ranks,
            pcp_rank=coords.pcp_rank % row_ranks,
            shard=shard,
        )
        seen_rows = decode_plan.rows
        if case.window is not None:
            seen_rows = rows_in_window(decode_plan, sharding, shard, case.window)
        rows = {case.window: seen_rows.over(cache.layout)}
        decode = DecodeStep(decode_plan, {w: backend.plan(r) for w, r in rows.items()}, cache, exchange, stored)
        own = decode_plan.own.tolist()
        # A padding row holds whatever: nothing of it may ever show.
        where = [(here[i], positions[i], positions[i] + 1) if i >= 0 else (0, 0, 1) for i in own]
        out = decode.attend(layer, *pack(where))
        for row, i in enumerate(own):
            if i >= 0:
                parts.append(_Part(here[i], range(positions[i], positions[i] + 1), q_heads, out[row : row + 1]))
    return parts, prefill_traffic, dcp.traffic


def _inputs(case: Case, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q `[length, HQ, D]`, k and v `[length, HK, D]`; the logits have std 3 when peaked (with a sink), else 0.1.

    Of latents k is `[length, 1, C + R]`, what is cached, and v the first columns of it.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    layout = case.cache_layout(case.num_kv_heads)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(length, heads, dim, generator=generator)

    q, k = normal(case.num_q_heads, case.q_dim), normal(layout.num_heads, layout.k_dim)
    v = k[..., : layout.v_dim] if layout.v_is_prefix_of_k else normal(layout.num_heads, layout.v_dim)
    q = q * (3.0 if case.peaked else 0.1)
    if case.peaked:
        k[0] *= 3.0
    q, k, v = (x.to(case.device, case.dtype) for x in (q, k, v))
    return q, k, v


def _block_tables(case: Case) -> tuple[list[list[int]], int]:
    """Blocks for every sequence, scattered: neighbours in a table are no neighbours in the cache."""
    sharding = KVSharding(case.grid.dcp_size, case.interleave, case.block_size)
    needed = [sharding.num_blocks(length + case.num_new_tokens) for length in case.prompt_lens]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(7)).tolist()
    tables = []
    for n in needed:
        tables.append(order[:n])
        order = order[n:]
    return tables, sum(needed) + 2
