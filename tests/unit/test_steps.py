"""One layer of one step: what every rank caches, what its queries see, what is merged, and where sinks count."""

import pytest
import torch

from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.attention.layer import AttentionLayer, LatentLayer
from cpinfer.attention.steps import DecodeStep, IdleStep, PrefillStep
from cpinfer.comm.threads import run_ranks
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.decode import plan_decode, rows_in_window
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import plan_prefill, zigzag_split
from cpinfer.layout.shards import KVSharding
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.float8 import rounded_through
from cpinfer.ops.states import count_sinks, merge_states

CPU = torch.device("cpu")
D, SCALE = 6, 0.4
LENGTHS = (11, 5)
TABLES = [[3, 1, 6, 0], [5, 2, 4, 7]]
BLOCK_SIZE = 3

# grid, query heads, KV heads: one column, columns with copies of a head, groups that mix heads (unevenly in the last).
LAYOUTS = [
    (RankGrid(), 4, 2),
    (RankGrid(1, 2, 2), 4, 2),
    (RankGrid(2, 2, 4), 4, 1),
    (RankGrid(2, 2, 4), 4, 2),
    (RankGrid(2, 1, 2), 4, 2),
    (RankGrid(2, 2, 4), 4, 4),
    (RankGrid(6, 1, 3), 12, 3),
]


class World:
    """Queries, keys and values of all heads and tokens of two prompts, in float64, and a layout to compute them in."""

    def __init__(self, grid, num_q_heads, num_kv_heads):
        g = torch.Generator().manual_seed(0)
        self.grid, self.placement = grid, HeadPlacement(num_q_heads, num_kv_heads, grid.tp_size)
        self.sharding = KVSharding(grid.dcp_size, 1, BLOCK_SIZE)
        self.q, self.k, self.v = (
            [torch.randn(n + 1, heads, D, generator=g, dtype=torch.float64) for n in LENGTHS]
            for heads in (num_q_heads, num_kv_heads, num_kv_heads)
        )

    def heads(self, topology):
        """(the group's heads, this rank's query heads, its KV heads)."""
        tp_rank = topology.coords.tp_rank
        q_heads, kv_heads = self.placement.q_heads(tp_rank), self.placement.kv_heads(tp_rank)
        return self.placement.in_group(self.grid, tp_rank), list(q_heads), list(kv_heads)

    def cache(self, heads):
        return PagedKVCache(KVLayout(len(heads.kv_heads), D, D), 2, 8, BLOCK_SIZE, torch.float64, CPU)

    def attended(self, prompt, at, window=None):
        """The state of every head's query at one position."""
        begin = 0 if window is None else max(0, at - window + 1)
        keys, values = self.k[prompt][begin : at + 1], self.v[prompt][begin : at + 1]
        return dense_attention(self.q[prompt][at : at + 1], keys, values, scale=SCALE, causal=False)


def prefill(world, topology, context=None, window=None):
    """(the step, its cache, this rank's q, k, v, the (prompt, position) of each, its query heads)."""
    heads, q_heads, kv_heads = world.heads(topology)
    split = zigzag_split(LENGTHS, world.grid.pcp_size)
    pcp_rank, shard = topology.coords.pcp_rank, topology.kv_shard
    plan = plan_prefill(split, TABLES, world.sharding, pcp_rank=pcp_rank, shard=shard)
    cache = world.cache(heads)
    comm = topology.dcp if heads.is_mixed else topology.pcp
    rows = {None: plan.rows} | ({} if window is None else {window: plan.rows.within(window)})
    step = PrefillStep(plan, rows, TorchBackend(CPU), cache, comm, heads, context)
    tokens = [(piece.prompt, t) for piece in plan.pieces for t in range(piece.start, piece.end)]
    q = torch.stack([world.q[p][t][q_heads] for p, t in tokens])
    k, v = (torch.stack([x[p][t][kv_heads] for p, t in tokens]) for x in (world.k, world.v))
    return step, cache, (q, k, v), tokens, q_heads


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_new_query_sees_its_own_heads_up_to_itself_and_shards_cache_the_heads_of_their_group(layout, window):
    world = World(*layout)

    def body(topology):
        step, cache, qkv, tokens, q_heads = prefill(world, topology, window=window)
        assert step.num_tokens == len(tokens)
        for index in (1, 0):  # two layers, one after the other, through the same buffers
            out = step.attend(AttentionLayer(index, SCALE, window=window), *qkv)
        heads, *_ = world.heads(topology)
        for prompt, length in enumerate(LENGTHS):
            positions = world.sharding.positions(length, topology.kv_shard)
            slots = world.sharding.slots(torch.tensor(TABLES[prompt]).numpy(), positions, topology.kv_shard)
            for index in (0, 1):
                for stored, x in zip(cache.read(index), (world.k, world.v), strict=True):
                    assert torch.equal(stored[slots], x[prompt][positions][:, list(heads.kv_heads)])
        for (prompt, at), got in zip(tokens, out, strict=True):
            want, _ = world.attended(prompt, at, window)
            torch.testing.assert_close(got, want[0, q_heads], atol=1e-10, rtol=0)
        return len(tokens)

    counts = run_ranks(world.grid, body)
    assert sum(counts) == world.grid.tp_size * sum(LENGTHS)


class Context:
    """A state that is the same for every query, and the layers that asked for it."""

    def __init__(self):
        self.asked = []

    def attend(self, layer, q):
        self.asked.append(layer.index)
        return torch.ones_like(q), torch.full(q.shape[:2], 1.5, dtype=q.dtype)


def test_context_is_merged_where_a_layer_sees_all_of_it_and_not_asked_where_a_window_hides_it():
    world = World(RankGrid(1, 2, 2), 4, 2)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def body(topology):
        context = Context()
        step, _, qkv, tokens, _ = prefill(world, topology, context, window=3)
        full = step.attend(AttentionLayer(0, SCALE, sinks=sinks), *qkv)
        windowed = step.attend(AttentionLayer(1, SCALE, window=3), *qkv)
        assert context.asked == [0]
        for row, (prompt, at) in enumerate(tokens):
            own = world.attended(prompt, at)
            merged = merge_states([own, Context().attend(AttentionLayer(0, SCALE), own[0])])
            torch.testing.assert_close(full[row], count_sinks(*merged, sinks)[0], atol=1e-10, rtol=0)
            torch.testing.assert_close(windowed[row], world.attended(prompt, at, 3)[0][0], atol=1e-10, rtol=0)

    run_ranks(world.grid, body)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_next_token_sees_all_shards_and_itself_with_each_sink_counted_once(layout, window, with_sinks):
    world = World(*layout)
    num_q_heads = layout[1]
    sinks = 2 * torch.randn(num_q_heads, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def body(topology):
        heads, q_heads, kv_heads = world.heads(topology)
        cache, shard = world.cache(heads), topology.kv_shard
        for prompt, length in enumerate(LENGTHS):
            positions = world.sharding.positions(length, shard)
            slots = world.sharding.slots(torch.tensor(TABLES[prompt]).numpy(), positions, shard)
            k, v = (x[prompt][positions][:, list(heads.kv_heads)] for x in (world.k, world.v))
            cache.write(0, torch.from_numpy(slots), (k, v))
        pcp = world.grid.row_ranks
        plan = plan_decode(
            LENGTHS, TABLES, world.sharding, pcp_size=pcp, pcp_rank=topology.coords.pcp_rank % pcp, shard=shard
        )
        exchange = AllToAllExchange(topology.dcp, pcp_size=pcp, wire_dtype=torch.float32, kv_columns=heads.columns)
        rows = {window: plan.rows if window is None else rows_in_window(plan, world.sharding, shard, window)}
        # Partial states travel with a float32 lse, so decode runs in float32.
        cache32 = PagedKVCache(cache.layout, 1, 8, BLOCK_SIZE, torch.float32, CPU)
        for new, old in zip(cache32.read(0), cache.read(0), strict=True):
            new.copy_(old)
        step = DecodeStep(plan, {w: TorchBackend(CPU).plan(r) for w, r in rows.items()}, cache32, exchange, heads)
        own = [int(i) for i in plan.own]
        assert step.num_tokens == sum(i >= 0 for i in own)
        q, k, v = (
            torch.stack([x[max(i, 0)][LENGTHS[max(i, 0)]][which] for i in own]).float()
            for x, which in ((world.q, q_heads), (world.k, kv_heads), (world.v, kv_heads))
        )
        layer = AttentionLayer(0, SCALE, window=window, sinks=sinks[q_heads] if with_sinks else None)
        out = step.attend(layer, q, k, v)
        assert out.shape == q.shape and out.dtype == q.dtype
        for i, got in zip(own, out, strict=True):
            if i >= 0:
                state = world.attended(i, LENGTHS[i], window)
                want = count_sinks(*state, sinks) if with_sinks else state[0]
                torch.testing.assert_close(got.double(), want[0, q_heads], atol=2e-5, rtol=0)

    run_ranks(world.grid, body)


def test_a_step_without_sequences_gives_zeros_of_the_values_width():
    q, k, v = torch.randn(1, 4, D), torch.randn(1, 2, D), torch.randn(1, 2, 5)
    assert torch.equal(IdleStep().attend(AttentionLayer(0, 1.0), q, k, v), torch.zeros(1, 4, 5))
    # Of latents the values are as wide as what they are projected to.
    layer = LatentLayer(0, 1.0, w_k=torch.zeros(4, D, 9), w_v=torch.zeros(4, 7, 9))
    assert torch.equal(IdleStep().attend(layer, q, torch.randn(1, 1, 12), torch.randn(1, 1, 9)), torch.zeros(1, 4, 7))


@pytest.mark.parametrize("store_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_keys_and_values_are_rounded_before_anyone_sees_them_and_too_large_ones_are_the_largest(layout, store_dtype):
    """In prefill by who attends to new tokens and by who stores them, in decode by the owner; nobody sees others."""
    world, rounded = World(*layout), World(*layout)
    for made, seen in ((world.k, rounded.k), (world.v, rounded.v)):
        for x, y in zip(made, seen, strict=True):
            x[2, 0, 0], x[-1, 0, 1] = 1e6, -1e6
            y.copy_(rounded_through(x, store_dtype))

    def stored(topology, cache, heads, prompt, length):
        positions = world.sharding.positions(length, topology.kv_shard)
        slots = world.sharding.slots(torch.tensor(TABLES[prompt]).numpy(), positions, topology.kv_shard)
        for found, x in zip(cache.read(0), (rounded.k, rounded.v), strict=True):
            assert found.dtype == store_dtype
            assert torch.equal(found[slots].double(), x[prompt][positions][:, list(heads.kv_heads)])

    def fp8_cache(heads):
        return PagedKVCache(
            KVLayout(len(heads.kv_heads), D, D), 1, 8, BLOCK_SIZE, torch.float64, CPU, store_dtype=store_dtype
        )

    world.cache = fp8_cache

    def body(topology):
        step, cache, qkv, tokens, q_heads = prefill(world, topology)
        out = step.attend(AttentionLayer(0, SCALE), *qkv)
        for (prompt, at), got in zip(tokens, out, strict=True):
            torch.testing.assert_close(got, rounded.attended(prompt, at)[0][0, q_heads], atol=1e-9, rtol=0)
        heads, _, kv_heads = world.heads(topology)
        for prompt, length in enumerate(LENGTHS):
            stored(topology, cache, heads, prompt, length)
        pcp = world.grid.row_ranks
        plan = plan_decode(
            LENGTHS,
            TABLES,
            world.sharding,
            pcp_size=pcp,
            pcp_rank=topology.coords.pcp_rank % pcp,
            shard=topology.kv_shard,
        )
        exchange = AllToAllExchange(topology.dcp, pcp_size=pcp, wire_dtype=torch.float32, kv_columns=heads.columns)
        decode = DecodeStep(plan, {None: Float32(TorchBackend(CPU).plan(plan.rows))}, cache, exchange, heads)
        own = [int(i) for i in plan.own]
        q, k, v = (
            torch.stack([x[max(i, 0)][LENGTHS[max(i, 0)]][which] for i in own])
            for x, which in ((world.q, q_heads), (world.k, kv_heads), (world.v, kv_heads))
        )
        decode.attend(AttentionLayer(0, SCALE), q, k, v)
        for prompt, length in enumerate(LENGTHS):
            stored(topology, cache, heads, prompt, length + 1)

    run_ranks(world.grid, body)


class Float32:
    """Partial states travel with a float32 lse."""

    def __init__(self, planned):
        self._planned = planned

    def run(self, *args, **kwargs):
        return tuple(x.float() for x in self._planned.run(*args, **kwargs))
