"""Ranks as threads: prefill and decode of a few sequences on random q, k, v, against dense attention in float64.

One "layer" is enough: what a layout can get wrong (ownership, order, masks, merges) does not depend on depth. Query and
KV heads are those of a whole model; each rank takes the slice that tensor parallelism would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpinfer.backends.base import AttentionBackend
from cpinfer.backends.torch_backend import TorchBackend
from cpinfer.cache.paged_kv_cache import PagedKVCache
from cpinfer.comm.axis import CountingComm, Traffic
from cpinfer.comm.threads import run_ranks
from cpinfer.comm.topology import Topology
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.decode import plan_decode
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import PrefillPlan, deal_prompts, plan_prefill, split_prompts
from cpinfer.layout.shards import KVSharding
from cpinfer.models.attention_steps import DecodeStep, PrefillStep
from cpinfer.ops.attention import dense_attention

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


@dataclass(frozen=True)
class Tampering:
    """Ways to be wrong, each the identity here; negative controls replace one."""

    backend: Callable[[AttentionBackend], AttentionBackend] = lambda backend: backend
    topology: Callable[[Topology], Topology] = lambda topology: topology
    plan: Callable[[PrefillPlan], PrefillPlan] = lambda plan: plan
    shard: Callable[[Topology], int] = lambda topology: topology.kv_shard


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
    scale = case.head_dim**-0.5
    oracle = [dense_attention(*(x.double() for x in qkv), scale=scale, causal=True)[0] for qkv in inputs]
    seen = [torch.zeros(x.shape[:2]) for x in oracle]
    worst = 0.0
    for parts, _, _ in ranks:
        for part in parts:
            where = (torch.tensor(list(part.positions))[:, None], torch.tensor(list(part.q_heads))[None, :])
            error = (oracle[part.sequence][where] - part.out).abs().max().item()
            # max() would pass over a NaN.
            worst = error if error != error else max(worst, error)
            seen[part.sequence][where] += 1
    # Rows are dealt over pcp, heads over tp: every (position, head) is computed once per home.
    assert all((count == case.grid.pcp_size // case.grid.row_ranks).all() for count in seen)
    return Outcome(worst, [prefill for _, prefill, _ in ranks], [decode for _, _, decode in ranks])


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
    sharding = KVSharding(grid.dcp_size, case.interleave, case.block_size)
    shard = tampering.shard(topology)
    cache = PagedKVCache(
        KVLayout(len(kv_heads), case.head_dim, case.head_dim), 1, num_blocks, case.block_size, torch.float32, CPU
    )
    backend = tampering.backend(TorchBackend(CPU))
    pcp, dcp = CountingComm(topology.pcp), CountingComm(topology.dcp)
    scale = case.head_dim**-0.5
    parts: list[_Part] = []

    def heads_of(tokens: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = tokens
        return q[:, list(q_heads)], k[:, list(kv_heads)], v[:, list(kv_heads)]

    def pack(where: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of `[start, end)` of sequences, packed; one token of the first sequence where there are none."""
        where = where or [(0, 0, 1)]
        return heads_of(tuple(torch.cat([inputs[i][j][a:b] for i, a, b in where]) for j in range(3)))  # type: ignore[arg-type]

    dealt = deal_prompts(case.prompt_lens, grid.pcp_size) if case.whole_prompts else None
    split = split_prompts(case.prompt_lens, grid.pcp_size, page_size=case.page_size, dealt=dealt)
    plan = plan_prefill(split, tables, sharding, pcp_rank=coords.pcp_rank, shard=shard)
    prefill = PrefillStep(tampering.plan(plan), backend, cache, pcp)
    out = prefill.attend(0, *pack([(p.prompt, p.start, p.end) for p in plan.pieces]), scale=scale)
    start = 0
    for p in plan.pieces:
        parts.append(_Part(p.prompt, range(p.start, p.end), q_heads, out[start : start + p.num_tokens]))
        start += p.num_tokens

    for step in range(case.num_new_tokens):
        positions = [length + step for length in case.prompt_lens]
        decode_plan = plan_decode(
            positions, tables, sharding, pcp_size=grid.pcp_size, pcp_rank=coords.pcp_rank, shard=shard
        )
        decode = DecodeStep(decode_plan, backend, cache, dcp, pcp_size=grid.pcp_size, wire_dtype=torch.float32)
        own = decode_plan.own.tolist()
        # A padding row holds whatever: nothing of it may ever show.
        where = [(i, positions[i], positions[i] + 1) if i >= 0 else (0, 0, 1) for i in own]
        out = decode.attend(0, *pack(where), scale=scale)
        for row, i in enumerate(own):
            if i >= 0:
                parts.append(_Part(i, range(positions[i], positions[i] + 1), q_heads, out[row : row + 1]))
    return parts, pcp.traffic, dcp.traffic


def _inputs(case: Case, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q `[length, HQ, D]`, k and v `[length, HK, D]`; the logits have std 3 when peaked (with a sink), else 0.1."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(length, heads, case.head_dim, generator=generator)

    q, k, v = normal(case.num_q_heads), normal(case.num_kv_heads), normal(case.num_kv_heads)
    q = q * (3.0 if case.peaked else 0.1)
    if case.peaked:
        k[0] *= 3.0
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
