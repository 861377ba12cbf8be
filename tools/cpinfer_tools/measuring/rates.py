"""What a rank of this machine reaches, for the model of cost: small measurements, none of them of a step to predict.

    products   the projections and MLP of a layer, with its norms and activations, at several numbers of rows
    attention  the backend's kernel over one long causal row, and over rows of one query
    memory     a sum over a large array
    link       gathers, sums and all-to-alls of next to nothing between products, as layers have them, and of megabytes
    exchange   what decode packs and merges around its collectives, these left out
    host       decode steps of toy models, of more and of fewer layers and sequences, without what products take in them

Ranks measure all together, each on its own clock, so that they share cores, caches and memory as they will; the
slowest rank counts.

Letters: R rows, H query heads, K KV heads, D head dim, S keys.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.registry import make_backend
from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.comm.axis import AxisComm
from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.layout.cost_model import Link, Rates
from cpinfer.layout.rows import AttentionRows
from cpinfer_tools.measuring.workloads import FLOAT32_BYTES, ModelShape, make_model, random_prompts

ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
BLOCK_SIZE = 16
CPU = torch.device("cpu")
# Of a step whose cost is its host's: a model of so few values that its products cost no more than their calls.
TOY = ModelShape(
    num_layers=2, hidden_size=64, intermediate_size=96, num_q_heads=4, num_kv_heads=2, head_dim=16, vocab_size=128
)
MORE_LAYERS, MORE_ROWS = 6, 16
_LINK_BYTES = 4 * 2**20

# Gathers what each rank measured; of one rank itself.
Everyone = Callable[[float], Sequence[float]]


def measured_rates(shape: ModelShape, comm: AxisComm, everyone: Everyone, *, quick: bool = False) -> Rates:
    """The rates of a rank, for a model of `shape`; `comm` is over all of them. Collective."""

    def slowest(seconds: float) -> float:
        return max(everyone(seconds))

    repeats = 1 if quick else 5
    rows = ROWS[::3] if quick else ROWS
    products = tuple((n, 2 * n * shape.layer_params / slowest(layer_s(shape, n, repeats))) for n in rows)
    keys = 256 if quick else 4096
    row = AttentionRows.build([keys], [keys], [range(keys // BLOCK_SIZE)], block_size=BLOCK_SIZE, causal=True)
    pairs = keys * (keys + 1) // 2
    prefill_s = slowest(attention_s(shape, row, repeats))
    singles = 4
    decoded = AttentionRows.build(
        [1] * singles,
        [keys] * singles,
        [range(i * keys // BLOCK_SIZE, (i + 1) * keys // BLOCK_SIZE) for i in range(singles)],
        block_size=BLOCK_SIZE,
        causal=False,
    )
    decode_s = slowest(attention_s(shape, decoded, repeats))
    flops_per_pair = shape.flops_per_pair / shape.num_layers
    big = torch.ones(2**20 if quick else 2**25)
    rates = Rates(
        product_flops=products,
        attention_flops=pairs * flops_per_pair / prefill_s,
        decode_flops=singles * keys * flops_per_pair / decode_s,
        memory_bandwidth=big.nbytes / slowest(best_s(big.sum, repeats)),
        link=measured_link(shape, comm, slowest, quick=quick),
    )
    step_s, layer_host_s, row_s = (slowest(x) for x in host_s(repeats))
    pack_s = slowest(exchange_s(shape, repeats))
    return dataclasses.replace(rates, step_s=step_s, layer_s=layer_host_s, row_s=row_s, exchange_s=pack_s)


def layer_s(shape: ModelShape, num_rows: int, repeats: int) -> float:
    """Seconds of a layer's products on R rows, with norms and activations, attention left out."""
    with torch.inference_mode():
        return best_s(products_of(shape, num_rows), repeats) / shape.num_layers


def products_of(shape: ModelShape, num_rows: int) -> Callable[[], None]:
    """The products of all layers of a shape, one after the other: each has weights of its own, as in a model."""
    sizes = (
        (shape.num_q_heads * shape.head_dim, shape.hidden_size),
        (shape.num_kv_heads * shape.head_dim, shape.hidden_size),
        (shape.num_kv_heads * shape.head_dim, shape.hidden_size),
        (shape.hidden_size, shape.num_q_heads * shape.head_dim),
        (shape.intermediate_size, shape.hidden_size),
        (shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    )
    layers = [[torch.randn(size) / size[1] ** 0.5 for size in sizes] for _ in range(shape.num_layers)]
    norm = torch.ones(shape.hidden_size)

    def run() -> None:
        x = torch.randn(num_rows, shape.hidden_size)
        for q, k, v, o, gate, up, down in layers:
            normed = F.rms_norm(x, norm.shape, norm)
            F.linear(normed, k)
            F.linear(normed, v)
            x = x + F.linear(F.linear(normed, q), o)
            normed = F.rms_norm(x, norm.shape, norm)
            x = x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)

    return run


def attention_s(shape: ModelShape, rows: AttentionRows, repeats: int) -> float:
    """Seconds of a layer's attention over given rows, by the backend that the engine takes."""
    num_slots = (int(rows.block_ids.max()) + 1) * BLOCK_SIZE
    keys, values = torch.randn(2, num_slots, shape.num_kv_heads, shape.head_dim)
    q = torch.randn(rows.num_queries, shape.num_q_heads, shape.head_dim)
    planned = make_backend("auto", CPU, AttentionNeeds(torch.float32, ())).plan(rows)
    with torch.inference_mode():
        return best_s(lambda: planned.run(q, keys, values, scale=shape.head_dim**-0.5), repeats)


def measured_link(shape: ModelShape, comm: AxisComm, slowest: Callable[[float], float], *, quick: bool = False) -> Link:
    """Latency and bandwidth of collectives over all ranks: means of the three kinds. Of one rank no link: no time.

    Latency is what a tiny one adds to the products of a few rows before it: ranks come to it at different times, and
    find their caches used.
    """
    n = comm.size
    if n == 1:
        return Link(float("inf"), 0.0)
    num, large = (5, 2**14) if quick else (20, _LINK_BYTES // FLOAT32_BYTES)
    products = products_of(shape, 8)
    alone_s = slowest(best_s(partial(_often, num, products), 5))
    latencies, bandwidths = [], []
    for call, share in ((comm.all_gather, n), (comm.all_to_all, 1), (comm.all_reduce, 2)):
        small, block = torch.zeros(n, 16), torch.zeros(n, large // n)
        latency_s = max(0.0, slowest(best_s(partial(_often, num, products, partial(call, small)), 5)) - alone_s) / num
        moving_s = slowest(best_s(partial(call, block), 3)) - latency_s
        latencies.append(latency_s / (n - 1).bit_length())
        bandwidths.append(share * (n - 1) * block.nbytes / n / max(moving_s, 1e-9))
    return Link(statistics.harmonic_mean(bandwidths), statistics.mean(latencies))


def _often(num: int, *calls: Callable[[], object]) -> None:
    with torch.inference_mode():
        for _ in range(num):
            for call in calls:
                call()


@dataclasses.dataclass(frozen=True)
class EchoComm:
    """An axis whose other places say what this one says, at once."""

    size: int = 2
    index: int = 0

    def all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return torch.stack([x] * self.size, out=out)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.size


def exchange_s(shape: ModelShape, repeats: int, num_rows: int = 8) -> float:
    """Seconds of what decode does around the collectives of an exchange of R rows over two ranks, per layer."""
    exchange = AllToAllExchange(EchoComm(), pcp_size=2, wire_dtype=torch.float32)
    q = torch.randn(num_rows, shape.num_q_heads, shape.head_dim)
    k, v = torch.randn(2, num_rows, shape.num_kv_heads, shape.head_dim)
    out, lse = (
        torch.randn(2 * num_rows, shape.num_q_heads, shape.head_dim),
        torch.randn(2 * num_rows, shape.num_q_heads),
    )

    def run() -> None:
        exchange.gather_qkv(q, [k, v])
        exchange.return_partials((out, lse))

    with torch.inference_mode():
        return best_s(run, 10 * repeats)


def host_s(repeats: int) -> tuple[float, float, float]:
    """Seconds of a decode step, of each of its layers, and of each sequence in it, that no product accounts for.

    From toy models alone on this rank, whose products are taken off, as `layer_s` finds them.
    """
    deep = dataclasses.replace(TOY, num_layers=MORE_LAYERS)
    few, many = (_step_s(TOY, n, repeats) - TOY.num_layers * layer_s(TOY, n, repeats) for n in (1, MORE_ROWS))
    deeper = _step_s(deep, 1, repeats) - MORE_LAYERS * layer_s(deep, 1, repeats)
    of_layer = max(0.0, (deeper - few) / (MORE_LAYERS - TOY.num_layers))
    of_row = max(0.0, (many - few) / (MORE_ROWS - 1))
    return max(0.0, few - TOY.num_layers * of_layer - of_row), of_layer, of_row


def _step_s(shape: ModelShape, num_rows: int, repeats: int) -> float:
    """Seconds of a decode step of a model of `shape`."""
    config = EngineConfig(dtype="float32", block_size=BLOCK_SIZE, kv_cache_gib=2**-6)
    prompts = [list(p) for p in random_prompts([BLOCK_SIZE] * num_rows, shape.vocab_size, 7)]
    with cpinfer.attach(make_model(shape), config=config) as engine:
        return decode_step_s(engine, prompts, repeats)


def decode_step_s(engine: Any, prompts: list[list[int]], repeats: int, num_steps: int = 16) -> float:
    """Seconds of a decode step: what so many more tokens take, behind prompts that have been seen before. Collective.

    Of `repeats` pairs of calls the least of each: what is above that is other programs on the machine.
    """

    def generate(num_new: int) -> float:
        start_s = time.perf_counter()
        engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=num_new, ignore_eos=True))
        return time.perf_counter() - start_s

    generate(num_steps + 1)
    times = [(generate(1), generate(num_steps + 1)) for _ in range(max(2, repeats))]
    less, more = min(one for one, _ in times), min(many for _, many in times)
    return max(more - less, 1e-9) / num_steps


def best_s(call: Callable[[], object], repeats: int) -> float:
    """The least seconds of `call` of so many, after one that does not count."""
    call()
    times = []
    for _ in range(max(2, repeats)):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return min(times)
