"""Attention to what is cached: heads of mixed groups one by one, cached rows through one pair of buffers."""

import numpy as np
import pytest
import torch

from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.attention.context import CachedRowsGather, WindowContext, room_for_all, run_stored_heads
from cpinfer.attention.layer import AttentionLayer
from cpinfer.comm.axis import SoloComm
from cpinfer.comm.threads import run_ranks
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import WindowExchange
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import GroupHeads, HeadPlacement
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention

CPU = torch.device("cpu")
T, S, D, V = 3, 11, 8, 6
TABLE = [2, 0, 4]
BLOCK_SIZE = 4
SCALE = 0.3


def group(*q_per_kv):
    """A group that stores one KV head for each number of query heads."""
    return GroupHeads(
        num_q_heads=sum(q_per_kv),
        kv_heads=tuple(range(len(q_per_kv))),
        q_per_kv=q_per_kv,
        columns=tuple(range(len(q_per_kv))),
        own=slice(0, 1),
    )


def inputs(heads):
    g = torch.Generator().manual_seed(len(heads.q_per_kv))
    q = torch.randn(T, sum(heads.q_per_kv), D, generator=g, dtype=torch.float64)
    k = 3 * torch.randn(20, len(heads.q_per_kv), D, generator=g, dtype=torch.float64)
    v = torch.randn(20, len(heads.q_per_kv), V, generator=g, dtype=torch.float64)
    return q, k, v


def by_hand(heads, q, k, v, soft_cap=None):
    """Each query head by itself, over the KV head that `q_per_kv` gives it."""
    slots = torch.tensor([b * BLOCK_SIZE + i for b in TABLE for i in range(BLOCK_SIZE)][:S])
    outs, lses = [], []
    kv_of = [head for head, count in enumerate(heads.q_per_kv) for _ in range(count)]
    for query_head, head in enumerate(kv_of):
        one_q, one = slice(query_head, query_head + 1), slice(head, head + 1)
        out, lse = dense_attention(
            q[:, one_q], k[slots, one], v[slots, one], scale=SCALE, causal=False, soft_cap=soft_cap
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def planned():
    return TorchBackend(CPU).plan(AttentionRows.build([T], [S], [TABLE], block_size=BLOCK_SIZE, causal=False))


# Two calls of one shape in a row would share their memory, were it not copied.
GROUPS = [group(4, 2), group(2, 4), group(2, 2, 4), group(1, 2, 2, 1), group(3, 3, 3), group(2, 2), group(5)]


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("heads", GROUPS, ids=lambda heads: str(heads.q_per_kv))
def test_every_query_head_meets_its_own_kv_head_however_unevenly_they_are_shared(heads, soft_cap):
    q, k, v = inputs(heads)
    layer = AttentionLayer(0, SCALE, soft_cap)
    got = run_stored_heads(planned(), q, k, v, heads, layer)
    torch.testing.assert_close(got, by_hand(heads, q, k, v, soft_cap), atol=1e-10, rtol=0)


def test_heads_shared_in_another_way_would_be_seen():
    """The control: an even share of the queries is not what an uneven group has."""
    heads = group(4, 2)
    q, k, v = inputs(heads)
    even = run_stored_heads(planned(), q, k, v, group(3, 3), AttentionLayer(0, SCALE))
    assert float((even[0] - by_hand(heads, q, k, v)[0]).abs().max()) > 0.1


def test_states_of_an_uneven_group_survive_the_next_run_of_the_plan():
    """A plan's results are valid until it runs again; what is made of several runs has memory of its own."""
    heads = group(2, 2, 4)
    q, k, v = inputs(heads)
    plan, layer = planned(), AttentionLayer(0, SCALE)
    first = run_stored_heads(plan, q, k, v, heads, layer)
    kept = [x.clone() for x in first]
    run_stored_heads(plan, -q, k, v, heads, layer)
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))


@pytest.mark.parametrize("even", [True, False])
def test_even_groups_are_one_kernel_call_and_uneven_ones_one_for_each_kv_head(even):
    heads = group(2, 2, 2) if even else group(2, 2, 4)
    q, k, v = inputs(heads)
    plan, calls = planned(), []

    class Counting:
        def run(self, q, keys, values, **logits):
            calls.append((q.shape[1], keys.shape[1]))
            return plan.run(q, keys, values, **logits)

    run_stored_heads(Counting(), q, k, v, heads, AttentionLayer(0, SCALE))
    assert calls == ([(6, 3)] if even else [(2, 1), (2, 1), (4, 1)])


LAYOUTS = [KVLayout(2, 6, 4), KVLayout(2, 6, 4, v_is_prefix_of_k=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["k_and_v", "latent"])
def test_cached_rows_come_from_every_place_with_the_own_heads_alone(layout):
    """Gathers of different lengths go through one pair of buffers, longest and shortest in any order."""
    heads = HeadPlacement(4, 2, tp_size=2).in_group(RankGrid(2, 1, 2), tp_rank=1)
    assert heads.own == slice(1, 2)
    g = torch.Generator().manual_seed(0)
    content = torch.randn(2, 2, 12, 2, layout.width, generator=g)  # of every place and layer
    sent = {3: ([7, 0, 11], [5]), 1: ([2], []), 2: ([], [9, 8])}

    def body(topology):
        cache = PagedKVCache(layout, 2, 3, 4, torch.float32, CPU)
        place = topology.dcp.index
        for layer in range(2):
            cache.write(layer, torch.arange(12), cache.parts(*cache.views(content[place, layer])))
        gather = CachedRowsGather(cache, topology.dcp, heads, 3)
        results, buffers = [], set()
        for layer, length in ((0, 3), (1, 1), (0, 2), (1, 3)):
            got = gather(layer, torch.tensor(sent[length][place], dtype=torch.long), length)
            results.append((layer, length, got.clone()))
            buffers.add(got.untyped_storage().data_ptr())
        assert len(buffers) == 1
        return results

    for rank in run_ranks(RankGrid(2, 1, 2), body):
        for layer, length, got in rank:
            assert got.shape == (2 * length, 1, layout.width)
            for place in range(2):
                slots = sent[length][place]
                rows = got[place * length : place * length + len(slots)]
                assert torch.equal(rows, content[place, layer, slots, 1:2])
            assert got.isfinite().all(), "padding travels too"


def test_room_for_a_gather_over_one_place_is_what_is_sent():
    send = torch.zeros(3, 2)
    assert room_for_all(send, 1).data_ptr() == send.data_ptr() and room_for_all(send, 1).shape == (1, 3, 2)
    assert room_for_all(send, 4).shape == (4, 3, 2)


def test_alone_the_cached_rows_are_those_of_the_cache():
    layout = KVLayout(1, 6, 4)
    cache = PagedKVCache(layout, 1, 3, 4, torch.float32, CPU)
    rows = torch.randn(12, 1, layout.width)
    cache.write(0, torch.arange(12), cache.views(rows))
    heads = HeadPlacement(2, 1, tp_size=1).in_group(RankGrid(), 0)
    gather = CachedRowsGather(cache, SoloComm(), heads, 4)
    assert torch.equal(gather(0, torch.tensor([5, 1, 9]), 3), rows[[5, 1, 9]])
    assert torch.equal(gather(0, torch.tensor([2]), 1), rows[[2]])


@pytest.mark.parametrize("length", [0, 2])
def test_the_end_of_the_context_stands_before_the_new_tokens(length):
    layout = KVLayout(1, 6, 4)
    content, new = torch.randn(2, 12, 1, layout.width), torch.randn(5, 1, layout.width)
    slots = [np.array([3, 8][:length]), np.array([10][:length])]
    rows = AttentionRows.build([1], [0], [[]], block_size=1, causal=True)

    def body(topology):
        cache, place = PagedKVCache(layout, 1, 3, 4, torch.float32, CPU), topology.pcp.index
        cache.write(0, torch.arange(12), cache.views(content[place]))
        heads = HeadPlacement(2, 1, tp_size=1).in_group(topology.grid, 0)
        plan = WindowExchange(length, slots[place], rows)
        context = WindowContext([plan], TorchBackend(CPU), cache, topology.pcp, heads)
        ((_, queries, seen),) = context.before(AttentionLayer(0, SCALE, window=3), new)
        assert queries == slice(0, 1)
        return seen

    for got in run_ranks(RankGrid(1, 2, 2), body):
        assert got.shape == (2 * length + 5, 1, layout.width)
        assert torch.equal(got[2 * length :], new)
        for place in range(2):
            sent = content[place, slots[place]]
            assert torch.equal(got[place * length : place * length + len(sent)], sent)
