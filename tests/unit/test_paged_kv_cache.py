"""The KV cache: what is written to a slot is read there and nowhere else."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from cpinfer.kv_cache.paged_kv_cache import PagedKVCache, zeroed
from cpinfer.layout.capacity import KVLayout

LAYERS, BLOCKS, BLOCK_SIZE = 2, 3, 4
LATENT = KVLayout(1, 12, 8, v_is_prefix_of_k=True)
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SLOTS = BLOCKS * BLOCK_SIZE


def make_cache(layout=KVLayout(2, 8, 6), dtype=torch.float32):
    return PagedKVCache(layout, LAYERS, BLOCKS, BLOCK_SIZE, dtype, torch.device("cpu"))


def tokens(num, layout=KVLayout(2, 8, 6), dtype=torch.float32):
    k = torch.randn(num, layout.num_heads, layout.k_dim).to(dtype)
    v = torch.randn(num, layout.num_heads, layout.v_dim).to(dtype)
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_to_slots_is_read_there_and_nothing_else_changes(dtype):
    cache = make_cache(dtype=dtype)
    slots = torch.tensor([11, 0, 5])
    k, v = tokens(3, dtype=dtype)
    cache.write(1, slots, (k, v))
    keys, values = cache.read(1)
    assert keys.shape == (SLOTS, 2, 8) and values.shape == (SLOTS, 2, 6)
    assert torch.equal(keys[slots], k) and torch.equal(values[slots], v)
    others = [s for s in range(SLOTS) if s not in slots.tolist()]
    assert (keys[others] == 0).all() and (values[others] == 0).all()
    assert all((x == 0).all() for x in cache.read(0))


def test_a_later_write_replaces_an_earlier_one():
    cache = make_cache()
    cache.write(0, torch.tensor([3, 4]), tokens(2))
    k, v = tokens(1)
    cache.write(0, torch.tensor([4]), (k, v))
    assert torch.equal(cache.read(0)[0][4], k[0]) and torch.equal(cache.read(0)[1][4], v[0])


def test_writing_no_rows_changes_nothing():
    cache = make_cache()
    cache.write(0, torch.empty(0, dtype=torch.long), tokens(0))
    assert all((x == 0).all() for x in cache.read(0))


def test_the_store_starts_finite():
    for x in make_cache().read(0):
        assert x.isfinite().all()


def test_reading_copies_nothing():
    cache = make_cache()
    before = cache.read(0)[0]
    k, v = tokens(1)
    cache.write(0, torch.tensor([2]), (k, v))
    assert torch.equal(before[2], k[0])


def test_strided_rows_are_written_as_they_read():
    cache = make_cache(KVLayout(2, 8, 8))
    fused = torch.randn(5, 2, 16)
    cache.write(0, torch.tensor([1, 2, 3, 4, 5]), cache.views(fused))
    keys, values = cache.read(0)
    assert torch.equal(keys[1:6], fused[..., :8]) and torch.equal(values[1:6], fused[..., 8:])


def test_values_that_are_a_prefix_of_keys_have_no_store_of_their_own():
    layout = KVLayout(1, 12, 8, v_is_prefix_of_k=True)
    cache = make_cache(layout)
    k, _ = tokens(2, layout)
    cache.write(1, torch.tensor([7, 2]), cache.parts(k, k[..., :8]))
    keys, values = cache.read(1)
    assert values.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    assert torch.equal(values[[7, 2]], k[..., :8])


def test_values_of_their_own_are_stored_apart():
    keys, values = make_cache().read(0)
    assert values.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()


def test_the_store_has_the_bytes_that_capacity_counts():
    for layout in (KVLayout(2, 8, 6), KVLayout(1, 12, 8, v_is_prefix_of_k=True)):
        cache = make_cache(layout, torch.bfloat16)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for n in (0, 1) for x in cache.read(n)}
        assert sum(storages.values()) == SLOTS * layout.bytes_per_token(LAYERS, "bfloat16")


def filled_cache(layout=KVLayout(2, 8, 6), dtype=torch.float32):
    """A cache whose every slot of every layer differs."""
    cache = make_cache(layout, dtype)
    for layer in range(LAYERS):
        k, v = tokens(SLOTS, layout, dtype)
        cache.write(layer, torch.arange(SLOTS), cache.parts(k, v))
    return cache


@pytest.mark.parametrize("layout", [KVLayout(2, 8, 6), KVLayout(1, 12, 8, v_is_prefix_of_k=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copied_blocks_equal_their_sources_in_all_layers_and_nothing_else_changes(layout, dtype):
    for pairs in ([(2, 0)], [(1, 2), (1, 0)], [(0, 1)]):
        cache = filled_cache(layout, dtype)
        before = [[x.clone() for x in cache.read(layer)] for layer in range(LAYERS)]
        cache.copy_blocks(pairs)
        source = list(range(BLOCKS))
        for src, dst in pairs:
            source[dst] = src
        slots = [block * BLOCK_SIZE + i for block in source for i in range(BLOCK_SIZE)]
        for layer in range(LAYERS):
            for old, new in zip(before[layer], cache.read(layer), strict=True):
                assert torch.equal(new, old[slots])


def test_copying_no_blocks_changes_nothing():
    cache = filled_cache()
    before = [x.clone() for x in cache.read(0)]
    cache.copy_blocks([])
    assert all(torch.equal(old, new) for old, new in zip(before, cache.read(0), strict=True))


@pytest.mark.parametrize("layout", [KVLayout(2, 8, 6), KVLayout(1, 12, 8, v_is_prefix_of_k=True)], ids=str)
def test_new_rows_are_finite_zeros_with_room_for_k_and_v_side_by_side(layout):
    cache = make_cache(layout, torch.bfloat16)
    rows = cache.new_rows(5, layout.num_heads)
    assert rows.shape == (5, layout.num_heads, layout.width)
    assert (rows.dtype, rows.device) == (cache.dtype, cache.device) and (rows == 0).all()
    assert cache.new_rows(0, layout.num_heads).shape[0] == 0
    assert cache.new_rows(5, layout.num_heads).data_ptr() != rows.data_ptr()


GQA, MLA = KVLayout(2, 8, 6), KVLayout(1, 12, 8, v_is_prefix_of_k=True)


def test_parts_are_what_has_to_travel():
    k, v = tokens(3)
    assert all(x is y for x, y in zip(make_cache().parts(k, v), (k, v), strict=True))
    k, v = tokens(3, MLA)
    [part] = make_cache(MLA).parts(k, v)
    assert part is k


@pytest.mark.parametrize("layout", [GQA, MLA], ids=["k_and_v", "latent"])
def test_views_of_rows_are_keys_and_values_without_a_copy(layout):
    cache = make_cache(layout)
    rows = torch.randn(2, 5, layout.num_heads, layout.width)
    keys, values = cache.views(rows)
    assert keys.shape[-1] == layout.k_dim and values.shape[-1] == layout.v_dim
    assert torch.equal(keys, rows[..., : layout.k_dim])
    assert torch.equal(values, rows[..., : layout.v_dim] if layout is MLA else rows[..., layout.k_dim :])
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() == rows.data_ptr()
    if layout is MLA:  # the backend tells by this that values are a prefix of keys
        assert values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride()


@pytest.mark.parametrize("layout", [GQA, MLA], ids=["k_and_v", "latent"])
def test_what_is_packed_by_parts_comes_out_by_views(layout):
    """Every way of a token: into the send buffer, from it to the cache, and out of the cache again."""
    cache = make_cache(layout)
    k, v = tokens(4, layout)
    if layout is MLA:
        v = k[..., : layout.v_dim]
    send = cache.new_rows(6, layout.num_heads)
    places = torch.tensor([5, 0, 3, 1])
    for into, part in zip(cache.views(send), cache.parts(k, v), strict=False):
        into.index_copy_(0, places, part)
    cache.write(1, torch.tensor([9, 2, 4, 7]), cache.parts(*cache.views(send.index_select(0, places))))
    keys, values = cache.read(1)
    assert torch.equal(keys[[9, 2, 4, 7]], k) and torch.equal(values[[9, 2, 4, 7]], v)


@pytest.mark.parametrize(
    "array", [np.arange(5), np.arange(10)[::2], np.arange(5)[::-1], np.empty(0, dtype=np.int64)], ids=str
)
def test_row_numbers_of_a_plan_become_an_index_whatever_their_strides(array):
    index = make_cache().index(array)
    assert index.dtype == torch.int64 and index.tolist() == array.tolist()
    torch.zeros(20, 2).index_select(0, index)


# --- stores of fewer bits than the model computes in ---


def fp8_cache(layout=KVLayout(2, 8, 6), dtype=torch.float32, store_dtype=torch.float8_e4m3fn):
    return PagedKVCache(layout, LAYERS, BLOCKS, BLOCK_SIZE, dtype, torch.device("cpu"), store_dtype=store_dtype)


@pytest.mark.parametrize("store_dtype", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [KVLayout(2, 8, 6), LATENT], ids=str)
def test_what_is_rounded_is_stored_and_read_as_it_is(layout, dtype, store_dtype):
    cache = fp8_cache(layout, dtype, store_dtype)
    k, v = tokens(3, layout, dtype)
    k, v = cache.rounded(k, k[..., : layout.v_dim] if layout.v_is_prefix_of_k else v)
    assert k.dtype == v.dtype == dtype and cache.new_rows(3, 1).dtype == dtype
    slots = torch.tensor([11, 0, 5])
    cache.write(1, slots, cache.parts(k, v))
    keys, values = cache.read(1)
    assert keys.dtype == values.dtype == store_dtype
    assert torch.equal(keys[slots].to(dtype), k) and torch.equal(values[slots].to(dtype), v)
    assert layout.v_is_prefix_of_k == (values.data_ptr() == keys.data_ptr())


def test_a_store_of_the_models_dtype_rounds_nothing_and_costs_nothing():
    cache, (k, v) = make_cache(), tokens(3)
    same = cache.rounded(k, v)
    state = torch.zeros(3, 2, 6), torch.zeros(3, 2)
    assert same[0] is k and same[1] is v and not cache.rounds and cache.with_faults(state) is state


@pytest.mark.parametrize("layout", [KVLayout(2, 8, 6), LATENT], ids=str)
def test_a_store_in_fp8_has_the_bytes_that_capacity_counts(layout):
    cache = fp8_cache(layout, torch.bfloat16)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for n in (0, 1) for x in cache.read(n)}
    assert sum(storages.values()) == SLOTS * layout.bytes_per_token(LAYERS, "float8_e4m3fn")
    assert 2 * sum(storages.values()) == SLOTS * layout.bytes_per_token(LAYERS, "bfloat16")


@pytest.mark.parametrize("layout", [KVLayout(2, 8, 6), LATENT], ids=str)
def test_blocks_of_fp8_are_copied_bit_for_bit_nan_included(layout):
    cache = fp8_cache(layout)
    for layer in range(LAYERS):
        k, v = tokens(SLOTS, layout)
        k[2, 0, 1] = torch.nan
        cache.write(layer, torch.arange(SLOTS), cache.parts(*cache.rounded(k, v)))
    before = [[x.view(torch.uint8).clone() for x in cache.read(layer)] for layer in range(LAYERS)]
    cache.copy_blocks([(0, 2)])
    slots = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    for layer in range(LAYERS):
        for old, new in zip(before[layer], cache.read(layer), strict=True):
            assert torch.equal(new.view(torch.uint8), old[slots])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_once_a_fault_is_stored_all_that_is_read_is_nan_until_it_is_forgotten(which, wrong):
    cache = fp8_cache()
    state = torch.ones(3, 2, 6), torch.zeros(3, 2)
    cache.write(0, torch.tensor([3, 4]), cache.rounded(*tokens(2)))
    assert torch.equal(cache.with_faults(state)[0], state[0])
    bad = tokens(2)
    bad[which][1, 0, 0] = wrong
    cache.write(1, torch.tensor([5, 6]), cache.rounded(*bad))
    cache.write(0, torch.tensor([7, 8]), cache.rounded(*tokens(2)))
    out, lse = cache.with_faults(state)
    assert out.isnan().all() and torch.equal(lse, state[1])
    cache.forget_faults()
    assert torch.equal(cache.with_faults(state)[0], state[0])


@pytest.mark.parametrize("layout", [KVLayout(2, 8, 6), LATENT], ids=str)
@pytest.mark.parametrize("store_dtype", [torch.float32, *FP8], ids=str)
def test_a_cleared_cache_is_zeros_in_the_same_memory_and_knows_no_fault(store_dtype, layout):
    """Where it lies, and where the fault is kept, is what captured graphs have seen."""
    cache = fp8_cache(layout, store_dtype=store_dtype)
    places = [x.data_ptr() for layer in range(LAYERS) for x in cache.read(layer)] + [cache._fault.data_ptr()]
    k, v = tokens(SLOTS, layout)
    k[1, 0, 2] = torch.nan
    for layer in range(LAYERS):
        cache.write(layer, torch.arange(SLOTS), cache.parts(*cache.rounded(k, v)))
    assert cache.rounds == bool(cache._fault.isnan())
    cache.clear()
    stores = [x for layer in range(LAYERS) for x in cache.read(layer)]
    assert all((x.float() == 0).all() for x in stores) and cache._fault == 0
    assert [x.data_ptr() for x in stores] + [cache._fault.data_ptr()] == places


PAGEMAP = Path("/proc/self/pagemap")


def resident_bytes(x):
    """Of the pages that `x` lies in, those in memory. What the whole process has resident is told late, and others of
    its tensors come and go."""
    first, end = x.data_ptr() // mmap.PAGESIZE, -(-(x.data_ptr() + x.nbytes) // mmap.PAGESIZE)
    with PAGEMAP.open("rb", buffering=0) as pages:
        pages.seek(first * 8)
        entries = np.frombuffer(pages.read((end - first) * 8), np.uint64)
    assert len(entries) == end - first
    return int((entries >> np.uint64(62) != 0).sum()) * mmap.PAGESIZE  # bit 63: in memory, bit 62: swapped out


@pytest.mark.skipif(not PAGEMAP.exists(), reason="counts this process's pages as Linux does")
def test_a_pool_takes_memory_where_it_is_touched_and_nowhere_else():
    cache = PagedKVCache(KVLayout(8, 64, 64), 2, 2048, 16, torch.float32, torch.device("cpu"))
    stores = [x for layer in range(2) for x in cache.read(layer)]
    size = sum(x.nbytes for x in stores)
    assert size == 256 * 2**20
    assert sum(map(resident_bytes, stores)) < size / 16
    cache.clear()  # the control: what is written is there
    assert sum(map(resident_bytes, stores)) >= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *FP8], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 1), (0, 2, 4)])
def test_lazy_zeros_are_zeros_that_begin_where_torchs_own_tensors_do(dtype, shape):
    lazy = zeroed(shape, dtype, torch.device("cpu"))
    eager = torch.zeros(shape, dtype=dtype)
    assert lazy.shape == eager.shape and lazy.dtype == dtype and lazy.is_contiguous()
    assert (lazy.view(torch.uint8) == 0).all()
    assert lazy.nbytes == 0 or lazy.data_ptr() % 64 == eager.data_ptr() % 64 == 0
