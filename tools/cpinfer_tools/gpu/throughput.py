"""Stage throughput: what attention reaches, and what context parallelism costs beside it, ranks played in turn.

One GPU plays each rank of a layout by itself: it plans as that rank, packs as it, and attends to a gathered buffer that
is there already. What the network would take is not in these figures. 32 query heads over 8 KV heads of 128, bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds
from cpinfer.attention.cascade import plan_cascade
from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.steps import PrefillStep
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.decode import plan_decode
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import plan_prefill, zigzag_split
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import KVSharding
from cpinfer.ops.states import merge_packed, pack_by_place
from cpinfer_tools.gpu.stage import Figure, Found, Setting, copy_bytes_per_s, flops_per_s, host_s, median_s

BOOKKEEPING_TARGETS = {8192: 0.02, 32768: 0.005}
EFFICIENCY_TARGET = 0.97  # of 8 ranks, at 32k
DIRECT_TARGET = 1.05
DECODE_TARGET = 0.85


@dataclass(frozen=True)
class Sizes:
    """Prompts and ranks of prefill; sequences and keys of decode; heads and their dim."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    prompts: tuple[int, ...] = (8192, 32768, 131072)
    pcp_sizes: tuple[int, ...] = (1, 2, 4, 8)
    decodes: tuple[tuple[int, int], ...] = ((16, 32768), (4, 131072))  # sequences, keys of each on a rank
    block_sizes: tuple[int, ...] = (16, 64)
    groups: tuple[tuple[int, int], ...] = ((4, 16), (16, 8))  # of samples that share a prompt
    shared_keys: tuple[int, ...] = (512, 2048, 8192)
    own_keys: int = 512
    merged_rows: int = 256
    repeats: int = 10

    @property
    def kv(self) -> KVLayout:
        return KVLayout(self.num_kv_heads, self.head_dim, self.head_dim)

    def needs(self, dtype: torch.dtype) -> AttentionNeeds:
        return AttentionNeeds(dtype, ((self.num_q_heads, self.kv),))


SMOKE = Sizes(4, 2, 8, (64, 128), (1, 2), ((2, 64),), (16,), ((2, 2),), (32,), 16, 4, 2)


class PlayedAxis:
    """An axis whose other ranks have sent already: what a gather brings lies in its buffer, random and finite."""

    def __init__(self, size: int, index: int) -> None:
        self.size = size
        self.index = index
        self._is_filled = False

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = x.new_empty(self.size, *x.shape) if out is None else out
        if not self._is_filled:
            out.normal_()
            self._is_filled = True
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[0]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


def needs(setting: Setting) -> Iterator[AttentionNeeds]:
    """What is timed asks for this."""
    yield _sizes(setting).needs(setting.dtype)


def _sizes(setting: Setting) -> Sizes:
    if setting.is_smoke:
        return replace(SMOKE, head_dim=64) if setting.is_cuda else SMOKE
    return Sizes()


def run(setting: Setting) -> Found:
    """Prefill, decode and merge, each with its bound."""
    sizes = _sizes(setting)
    backend = setting.backend(sizes.needs(setting.dtype))
    copy_rate, flop_rate = copy_bytes_per_s(setting), flops_per_s(setting)
    return Found(
        (
            Figure("copy", copy_rate / 1e9, "GB/s", higher_is_better=True),
            Figure("matrix product", flop_rate / 1e12, "TFLOP/s", higher_is_better=True),
            *_prefill(setting, sizes, backend, flop_rate),
            *_decode(setting, sizes, backend, copy_rate),
            *_cascade(setting, sizes, backend, copy_rate),
            *_merge(setting, sizes, copy_rate),
        )
    )


def _prefill(setting: Setting, sizes: Sizes, backend: AttentionBackend, flop_rate: float) -> Iterator[Figure]:
    for length in sizes.prompts:
        repeats = sizes.repeats if length < 100_000 else 3
        alone_s = 0.0
        for pcp_size in sizes.pcp_sizes:
            ranks = [_play_prefill(setting, sizes, backend, length, pcp_size, r, repeats) for r in range(pcp_size)]
            slowest_s = max(played.attend_s for played in ranks)
            share = max(played.bookkeeping_s / played.attend_s for played in ranks)
            rate = min(played.num_pairs / played.attend_s for played in ranks) * 4 * sizes.num_q_heads * sizes.head_dim
            name = f"prefill {length:,} tokens, pcp={pcp_size}"
            yield Figure(f"{name}: slowest rank", rate / 1e12, "TFLOP/s", bound=flop_rate / 1e12, higher_is_better=True)
            # Of attention alone: of a whole layer it is less.
            yield Figure(f"{name}: bookkeeping", share, "of attention", target=BOOKKEEPING_TARGETS.get(length))
            if pcp_size == 1:
                alone_s = slowest_s
                if setting.device.type == "cuda":
                    direct_s = _direct_prefill(setting, sizes, length, repeats)
                    yield Figure(f"{name}: beside FlashInfer alone", alone_s / direct_s, "x", target=DIRECT_TARGET)
            else:
                target = EFFICIENCY_TARGET if (length, pcp_size) == (32768, 8) else None
                efficiency = alone_s / (pcp_size * slowest_s)
                yield Figure(
                    f"{name}: emulated efficiency", efficiency, "", bound=1.0, target=target, higher_is_better=True
                )
        # Balance wants pages of one token in short prompts; whether larger ones are faster to read, this shows.
        for page_size in (1, 16):
            last = sizes.pcp_sizes[-1] - 1
            played = _play_prefill(setting, sizes, backend, length, last + 1, last, repeats, page_size)
            name = f"prefill {length:,} tokens, last rank, scratch pages of {page_size}"
            yield Figure(name, played.attend_s * 1e3, "ms")


@dataclass(frozen=True)
class _Played:
    """Seconds of a layer's attention on one rank, and of what is in it whatever the layout: the kernel, and writing as
    many tokens to the cache. `num_pairs`: query-key pairs of the rank."""

    attend_s: float
    kernel_s: float
    write_s: float
    num_pairs: int

    @property
    def bookkeeping_s(self) -> float:
        return self.attend_s - self.kernel_s - self.write_s


def _play_prefill(
    setting: Setting,
    sizes: Sizes,
    backend: AttentionBackend,
    length: int,
    pcp_size: int,
    pcp_rank: int,
    repeats: int,
    page_size: int = 1,
) -> _Played:
    grid = RankGrid(1, pcp_size, pcp_size)
    sharding = KVSharding(pcp_size, 16, 16)
    table = list(range(sharding.num_blocks(length)))
    cache = PagedKVCache(sizes.kv, 1, len(table), 16, setting.dtype, setting.device)
    split = zigzag_split([length], pcp_size, page_size=page_size)
    plan = plan_prefill(split, [table], sharding, pcp_rank=pcp_rank, shard=pcp_rank)
    heads = HeadPlacement(sizes.num_q_heads, sizes.num_kv_heads, 1).in_group(grid, 0)
    axis = PlayedAxis(pcp_size, pcp_rank)
    step = PrefillStep(plan, {None: plan.rows}, backend, cache, axis, heads)
    q, k, v = _qkv(setting, sizes, len(plan.positions))
    layer = AttentionLayer(0, sizes.head_dim**-0.5)
    attend_s = median_s(partial(step.attend, layer, q, k, v), setting.device, repeats)
    gathered = cache.new_rows(pcp_size * split.part_len, sizes.num_kv_heads).normal_()
    planned = backend.plan(plan.rows)
    kernel = partial(planned.run, q, *cache.views(gathered), scale=layer.scale)
    slots = cache.index(plan.write_slots)
    write = partial(cache.write, 0, slots, (k[: len(slots)].clone(), v[: len(slots)].clone()))
    return _Played(
        attend_s,
        median_s(kernel, setting.device, repeats),
        median_s(write, setting.device, repeats),
        split.pairs_per_rank()[pcp_rank],
    )


def _direct_prefill(setting: Setting, sizes: Sizes, length: int, repeats: int) -> float:
    """Seconds of FlashInfer's own paged prefill on keys and values that lie in order."""
    import flashinfer  # type: ignore[import-not-found,unused-ignore]

    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=setting.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    q, k, v = _qkv(setting, sizes, length)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    pages = torch.arange(length // 16, dtype=torch.int32, device=setting.device)
    heads = (sizes.num_q_heads, sizes.num_kv_heads, sizes.head_dim)
    dtypes: dict[str, Any] = {"q_data_type": setting.dtype, "kv_data_type": setting.dtype}
    wrapper.plan(ints(0, length), ints(0, len(pages)), pages, ints(16), *heads, 16, causal=True, **dtypes)
    paged = tuple(x.view(-1, 16, *x.shape[1:]) for x in (k, v))
    return median_s(partial(wrapper.run, q, paged, return_lse=True), setting.device, repeats)


def _decode(setting: Setting, sizes: Sizes, backend: AttentionBackend, copy_rate: float) -> Iterator[Figure]:
    for num_sequences, num_keys in sizes.decodes:
        for block_size in sizes.block_sizes:
            sharding = KVSharding(1, block_size, block_size)
            per_sequence = sharding.num_blocks(num_keys)
            order = np.random.default_rng(0).permutation(num_sequences * per_sequence).reshape(num_sequences, -1)
            tables = order.tolist()
            positions = [num_keys - 1] * num_sequences
            plan = plan_decode(positions, tables, sharding, pcp_size=1, pcp_rank=0, shard=0)
            cache = PagedKVCache(sizes.kv, 1, order.size, block_size, setting.dtype, setting.device)
            keys, values = cache.read(0)
            keys.normal_()
            values.normal_()
            q, _, _ = _qkv(setting, sizes, num_sequences)
            planned = backend.plan(plan.rows)
            seconds = median_s(
                partial(planned.run, q, keys, values, scale=sizes.head_dim**-0.5), setting.device, sizes.repeats
            )
            rate = (keys.nbytes + values.nbytes) / seconds
            name = f"decode {num_sequences} x {num_keys:,} keys, blocks of {block_size}"
            # One of the block sizes has to reach it: the largest.
            must = block_size == sizes.block_sizes[-1] and not setting.is_smoke
            target = DECODE_TARGET * copy_rate / 1e9 if must else None
            yield Figure(name, rate / 1e9, "GB/s", bound=copy_rate / 1e9, target=target, higher_is_better=True)


def _cascade(setting: Setting, sizes: Sizes, backend: AttentionBackend, copy_rate: float) -> Iterator[Figure]:
    """Decode of groups: their prompts attended to together, and by each sample alone."""
    block_size, scale = 16, sizes.head_dim**-0.5
    for num_groups, num_samples in sizes.groups:
        for shared in sizes.shared_keys:
            num_shared, num_own = shared // block_size, sizes.own_keys // block_size
            num_blocks = num_groups * (num_shared + num_samples * num_own)
            blocks = iter(np.random.default_rng(0).permutation(num_blocks).tolist())
            tables = []
            for _ in range(num_groups):
                prompt = [next(blocks) for _ in range(num_shared)]
                tables += [prompt + [next(blocks) for _ in range(num_own)] for _ in range(num_samples)]
            lens = [shared + sizes.own_keys] * len(tables)
            rows = AttentionRows.build([1] * len(tables), lens, tables, block_size=block_size, causal=False)
            cache = PagedKVCache(sizes.kv, 1, num_blocks, block_size, setting.dtype, setting.device)
            keys, values = (x.normal_() for x in cache.read(0))
            q, _, _ = _qkv(setting, sizes, len(tables))
            name = f"decode {num_groups} x {num_samples} samples of {shared:,} shared and {sizes.own_keys} own keys"
            seconds = {}
            for way, min_saved_keys in (("together", 0), ("each alone", None)):
                planned = plan_cascade(backend, rows, min_saved_keys)
                seconds[way] = median_s(
                    partial(planned.run, q, keys, values, scale=scale), setting.device, sizes.repeats
                )
                yield Figure(
                    f"{name}: {way}", seconds[way] * 1e6, "us", bound=(keys.nbytes + values.nbytes) / copy_rate * 1e6
                )
                # Once per step, for all layers: what a gain has to pay for first.
                step = partial(_plan_and_run, backend, rows, min_saved_keys, (q, keys, values), scale)
                host_us = host_s(step, setting.device, sizes.repeats) * 1e6
                yield Figure(f"{name}: {way}, planned and launched by the host", host_us, "us")
            yield Figure(f"{name}: gain", seconds["each alone"] / seconds["together"], "x", higher_is_better=True)


def _plan_and_run(
    backend: AttentionBackend,
    rows: AttentionRows,
    min_saved_keys: int | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Backends may plan when the first layer runs."""
    plan_cascade(backend, rows, min_saved_keys).run(*inputs, scale=scale)


def _merge(setting: Setting, sizes: Sizes, copy_rate: float) -> Iterator[Figure]:
    """One exchange's packing and merging, of 8 shards."""
    shards, shape = 8, (sizes.merged_rows, sizes.num_q_heads, sizes.head_dim)
    out = torch.randn(shape, device=setting.device).to(setting.dtype)
    lse = torch.randn(shape[:2], device=setting.device)
    packed = pack_by_place(out, lse, setting.dtype, 1, 1).expand(shards, -1, -1, -1).contiguous()
    merged = merge_packed(packed, sizes.head_dim)
    pack_s = median_s(partial(pack_by_place, out, lse, setting.dtype, 1, 1), setting.device, sizes.repeats)
    merge_s = median_s(partial(merge_packed, packed, sizes.head_dim), setting.device, sizes.repeats)
    pack_bytes = out.nbytes + lse.nbytes + packed[0].nbytes
    merge_bytes = packed.nbytes + sum(x.nbytes for x in merged)
    rows = f"{shape[0]} rows of {shape[1]} heads"
    yield Figure(f"pack {rows}", pack_s * 1e6, "us", bound=pack_bytes / copy_rate * 1e6)
    yield Figure(f"merge {shards} states of {rows}", merge_s * 1e6, "us", bound=merge_bytes / copy_rate * 1e6)


def _qkv(setting: Setting, sizes: Sizes, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers: zeros would be faster than what models have."""

    def normal(heads: int) -> Tensor:
        return torch.randn(num_tokens, heads, sizes.head_dim, device=setting.device).to(setting.dtype)

    return normal(sizes.num_q_heads), normal(sizes.num_kv_heads), normal(sizes.num_kv_heads)
