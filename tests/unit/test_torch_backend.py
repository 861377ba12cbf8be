"""The torch backend: every shape of block table equals attention over the plain sequence, and touches nothing else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.registry import make_backend
from cpinfer.attention.backends.torch_backend import MIN_RUN_TOKENS, TorchBackend
from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops import attention
from cpinfer.ops.attention import dense_attention

CPU = torch.device("cpu")
H, K, D, V = 4, 2, 16, 8
SCALE = 1 / math.sqrt(D)
TOLERANCE = 1e-10  # float64


def make_rows(q_lens, ranges, tables, block_size, causal):
    """Rows over key ranges `[lo, hi)`; tables as long as they are."""
    return AttentionRows(
        q_lens=np.array(q_lens, dtype=np.int32),
        kv_lo=np.array([lo for lo, _ in ranges], dtype=np.int32),
        kv_hi=np.array([hi for _, hi in ranges], dtype=np.int32),
        block_indptr=np.cumsum([0, *map(len, tables)]).astype(np.int32),
        block_ids=np.array([b for table in tables for b in table], dtype=np.int32),
        block_size=block_size,
        causal=causal,
    )


def make_store(num_slots, dtype=torch.float64, seed=0):
    """Keys and values as views of one fused buffer, peaked like real ones."""
    g = torch.Generator().manual_seed(seed)
    fused = torch.randn(num_slots, K, D + V, generator=g, dtype=torch.float64)
    fused[..., :D] *= 3
    fused = fused.to(dtype)
    return fused[..., :D], fused[..., D:]


def queries(num, dtype=torch.float64, seed=1):
    return torch.randn(num, H, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(rows, q, keys, values, soft_cap=None):
    """Row by row: gather the keys slot by slot, then the definition of attention."""
    outs, lses, start = [], [], 0
    for row, q_len in enumerate(rows.q_lens.tolist()):
        if q_len == 0:
            continue
        slots = torch.from_numpy(rows.slots(row))
        out, lse = dense_attention(
            q[start : start + q_len],
            keys[slots],
            values[slots],
            scale=SCALE,
            causal=rows.causal,
            window=rows.window,
            soft_cap=soft_cap,
        )
        outs.append(out)
        lses.append(lse)
        start += q_len
    return torch.cat(outs), torch.cat(lses)


def check(rows, num_slots, tolerance=TOLERANCE, soft_cap=None):
    """Equal to the oracle, also when every slot outside of the planned keys holds NaN."""
    keys, values = make_store(num_slots)
    q = queries(rows.num_queries)
    want = oracle(rows, q, keys, values, soft_cap)
    unseen = np.setdiff1d(np.arange(num_slots), np.concatenate([rows.slots(i) for i in range(rows.num_rows)]))
    keys[unseen], values[unseen] = torch.nan, torch.nan
    out, lse = TorchBackend(CPU).plan(rows).run(q, keys, values, scale=SCALE, soft_cap=soft_cap)
    torch.testing.assert_close(out, want[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(lse, want[1], atol=tolerance, rtol=0)


def tables_of(kind, num_blocks, pool_blocks):
    """Block ids of one sequence in a pool of `pool_blocks`."""
    rng = np.random.default_rng(3)
    if kind == "contiguous":
        return list(range(5, 5 + num_blocks))
    if kind == "fragmented":
        return [3 * i + 1 for i in range(num_blocks)]
    if kind == "descending":
        return list(range(pool_blocks - 1, pool_blocks - 1 - num_blocks, -1))
    return rng.permutation(pool_blocks)[:num_blocks].tolist()


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["contiguous", "fragmented", "descending", "permuted"])
def test_any_block_table_equals_the_plain_sequence(kind, causal, block_size):
    for kv_len, q_len in ((1, 1), (37, 1), (37, 8), (37, 37), (48, 5)):
        num_blocks = -(-kv_len // block_size)
        pool = 3 * num_blocks + 8
        rows = make_rows([q_len], [(0, kv_len)], [tables_of(kind, num_blocks, pool)], block_size, causal)
        check(rows, pool * block_size)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_key_ranges_may_start_anywhere(causal, block_size):
    for lo, hi in ((1, 20), (15, 33), (16, 17), (31, 32), (3, 48)):
        q_len = min(3, hi - lo)
        for kind in ("contiguous", "permuted"):
            rows = make_rows([q_len], [(lo, hi)], [tables_of(kind, 48 // block_size, 60)], block_size, causal)
            check(rows, 60 * block_size)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_long_runs_are_read_and_merged(causal, block_size):
    """Three runs, each long enough to be a view of its own."""
    n = (MIN_RUN_TOKENS + 48) // block_size
    table = [*range(2 * n, 3 * n), *range(n), *range(4 * n, 5 * n)]
    for lo, q_len in ((0, 1), (0, 9), (7, 9), (0, 3 * n * block_size)):
        check(make_rows([q_len], [(lo, 3 * n * block_size)], [table], block_size, causal), 6 * n * block_size)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_all_kinds_stand_side_by_side(causal):
    tables = [[2, 3, 4], [], [9, 7, 11], [1], [20, 21], [5, 12]]
    ranges = [(0, 12), (0, 0), (2, 11), (0, 1), (3, 3), (1, 8)]
    rows = make_rows([4, 3, 1, 1, 2, 0], ranges, tables, 4, causal)
    check(rows, 96)
    keys, values = make_store(96)
    out, lse = TorchBackend(CPU).plan(rows).run(queries(11), keys, values, scale=SCALE)
    for empty in (slice(4, 7), slice(9, 11)):
        assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    assert lse[:4].isfinite().all() and lse[7:9].isfinite().all()


@pytest.mark.parametrize("window", [1, 3, 5, 16, 100])
@pytest.mark.parametrize("kind", ["contiguous", "fragmented", "descending", "permuted"])
def test_any_block_table_under_a_window_equals_the_plain_sequence(kind, window, monkeypatch):
    """What no query sees may be NaN: `within` has taken it away."""
    monkeypatch.setattr(attention, "MIN_WINDOW_TILE", 3)
    monkeypatch.setattr(attention, "MAX_WINDOW_TILE", 7)
    for block_size in (1, 4, 16):
        for kv_len, q_len in ((1, 1), (37, 1), (37, 8), (37, 37), (48, 5)):
            num_blocks = -(-kv_len // block_size)
            pool = 3 * num_blocks + 8
            table = tables_of(kind, num_blocks, pool)
            rows = make_rows([q_len], [(0, kv_len)], [table], block_size, True).within(window)
            check(rows, pool * block_size)


@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 4)])
def test_soft_caps_hold_for_any_rows(causal, window):
    tables = [[2, 3, 4], [], [9, 7, 11], [1], [20, 21]]
    rows = make_rows([4, 3, 1, 1, 2], [(0, 12), (0, 0), (2, 11), (0, 1), (3, 8)], tables, 4, causal)
    check(rows if window is None else rows.within(window), 96, soft_cap=2.0)


def test_rows_under_a_window_stand_beside_rows_without_keys():
    tables = [[2, 3, 4], [], [9, 7, 11], [1], [20, 21]]
    rows = make_rows([4, 3, 1, 1, 2], [(0, 12), (0, 0), (2, 11), (0, 1), (3, 8)], tables, 4, True).within(3)
    check(rows, 96)
    out, lse = TorchBackend(CPU).plan(rows).run(queries(11), *make_store(96), scale=SCALE)
    assert (out[4:7] == 0).all() and (lse[4:7] == -torch.inf).all() and lse[7:].isfinite().all()


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 4)])
@pytest.mark.parametrize("kind", ["contiguous", "permuted"])
def test_values_that_are_a_prefix_of_keys_equal_values_of_their_own(kind, causal, window, soft_cap):
    """As latents are cached: one head for all queries, of which the values are the first columns."""
    keys = make_store(96)[0][:, :1]
    q = queries(6)
    rows = make_rows([5, 1], [(0, 37), (2, 9)], [tables_of(kind, 10, 24), [23, 1, 2]], 4, causal)
    rows = rows if window is None else rows.within(window)
    got = TorchBackend(CPU).plan(of_latents(rows)).run(q, keys, keys[..., :V], scale=SCALE, soft_cap=soft_cap)
    want = TorchBackend(CPU).plan(rows).run(q, keys, keys[..., :V], scale=SCALE, soft_cap=soft_cap)
    assert got[0].shape == want[0].shape
    torch.testing.assert_close(tuple(got), tuple(want), atol=TOLERANCE, rtol=0)


def test_scattered_keys_are_copied_once_where_values_are_part_of_them():
    keys = make_store(160)[0][:, :1]
    rows = make_rows([1], [(0, 40)], [tables_of("permuted", 10, 40)], 4, False)

    def copies(rows):
        with torch.profiler.profile() as profile:
            TorchBackend(CPU).plan(rows).run(queries(1), keys, keys[..., :V], scale=SCALE)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::index_select")

    assert copies(of_latents(rows)) == 1
    assert copies(rows) == 2


def test_values_that_are_part_of_the_keys_are_not_padded_to_a_copy(monkeypatch):
    keys = make_store(96)[0][:, :1]
    rows = make_rows([5, 1], [(0, 37), (2, 9)], [tables_of("contiguous", 10, 24), [23, 1, 2]], 4, True)

    def refused(*_, **__):
        raise AssertionError("padded to a copy")

    monkeypatch.setattr(attention.F, "pad", refused)
    TorchBackend(CPU).plan(of_latents(rows)).run(queries(6), keys, keys[..., : D - 2], scale=SCALE)
    with pytest.raises(AssertionError, match="padded"):  # the control
        TorchBackend(CPU).plan(rows).run(queries(6), keys, keys[..., : D - 2], scale=SCALE)


def test_results_are_valid_until_the_plan_runs_again_and_rows_without_keys_stay_empty():
    """Layers share one place for results; what is empty in the plan is empty in every layer."""
    rows = make_rows([2, 1, 1], [(0, 12), (0, 0), (0, 5)], [[2, 3, 4], [], [9, 7]], 4, True)
    plan, (keys, values) = TorchBackend(CPU).plan(rows), make_store(64)
    first = plan.run(queries(4), keys, values, scale=SCALE)
    kept = [x.clone() for x in first]
    second = plan.run(queries(4, seed=9), keys, values, scale=SCALE)
    assert second[0].data_ptr() == first[0].data_ptr() and not torch.equal(first[0], kept[0])
    for out, lse in (kept, second):
        assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    # Layers of another width do not disturb each other.
    narrow = plan.run(queries(4), keys, values[..., :3], scale=SCALE)
    assert narrow[0].shape == (4, H, 3)
    torch.testing.assert_close(narrow[0], kept[0][..., :3], atol=TOLERANCE, rtol=0)


def test_rows_that_share_blocks_see_the_same_keys():
    """Two samples of one prompt: a common prefix, ends of their own."""
    check(make_rows([1, 1], [(0, 10), (0, 12)], [[4, 5, 6], [4, 5, 9]], 4, causal=False), 48)


def test_a_plan_without_rows_or_without_keys_gives_empty_states():
    keys, values = make_store(8)
    out, lse = TorchBackend(CPU).plan(make_rows([], [], [], 4, False)).run(queries(0), keys, values, scale=SCALE)
    assert out.shape == (0, H, V) and lse.shape == (0, H)
    rows = make_rows([2, 1], [(0, 0), (0, 0)], [[], []], 4, False)
    out, lse = TorchBackend(CPU).plan(rows).run(queries(3), keys, values, scale=SCALE)
    assert (out == 0).all() and (lse == -torch.inf).all()


def segments_of(plan):
    """Whether each kernel call of a plan reads a view of the store (True) or a copy (False)."""
    return [[isinstance(segment.keys, slice) for segment in segments] for _, segments in plan._calls]


def test_long_runs_are_views_and_not_copies():
    n = MIN_RUN_TOKENS // 16
    table = [*range(3 * n, 4 * n), *range(n), *range(6 * n, 7 * n)]
    plan = TorchBackend(CPU).plan(make_rows([1], [(0, 3 * n * 16)], [table], 16, False))
    assert segments_of(plan) == [[True, True, True]]


def test_no_key_is_copied_while_long_runs_are_read(monkeypatch):
    n = MIN_RUN_TOKENS // 16
    rows = make_rows([1], [(0, 2 * n * 16)], [[*range(3 * n, 4 * n), *range(n)]], 16, False)
    scattered = make_rows([1], [(0, 32)], [[5, 2]], 16, False)
    keys, values = make_store(4 * n * 16)

    def run(rows):
        with torch.profiler.profile() as profile:
            TorchBackend(CPU).plan(rows).run(queries(1), keys, values, scale=SCALE)
        return {event.key for event in profile.key_averages()}

    assert "aten::index_select" not in run(rows)
    assert "aten::index_select" in run(scattered)  # the control: the profiler would have seen one


def test_the_context_of_a_contiguous_causal_row_is_a_view_and_so_is_its_square():
    plan = TorchBackend(CPU).plan(make_rows([5], [(0, 40)], [list(range(4, 44))], 1, True))
    assert segments_of(plan) == [[True, True]]
    assert [segment.causal for segment in plan._calls[0][1]] == [False, True]


def test_scattered_keys_are_one_copy_and_one_call():
    plan = TorchBackend(CPU).plan(make_rows([1], [(0, 40)], [tables_of("permuted", 10, 40)], 4, False))
    assert segments_of(plan) == [[False]]


def test_plans_made_later_leave_earlier_ones_valid():
    backend = TorchBackend(CPU)
    keys, values = make_store(64)
    first = make_rows([3], [(0, 12)], [[5, 2, 8]], 4, True)
    plan = backend.plan(first)
    backend.plan(make_rows([1], [(0, 4)], [[1]], 4, False)).run(queries(1), keys, values, scale=SCALE)
    q = queries(3)
    torch.testing.assert_close(plan.run(q, keys, values, scale=SCALE), oracle(first, q, keys, values))


@pytest.mark.parametrize("num", [0, 2, 4])
def test_a_wrong_number_of_queries_is_refused(num):
    keys, values = make_store(64)
    plan = TorchBackend(CPU).plan(make_rows([3], [(0, 12)], [[5, 2, 8]], 4, True))
    with pytest.raises(ValueError, match=f"{num} queries were given to a plan of 3"):
        plan.run(queries(num), keys, values, scale=SCALE)


def test_a_nan_among_the_planned_keys_surfaces():
    """The control of the poison: NaN does leak when it lies where a row looks."""
    keys, values = make_store(64)
    rows = make_rows([1, 1], [(0, 6), (0, 4)], [[5, 2], [9]], 4, False)
    keys[2 * 4 + 1] = torch.nan  # the last key of row 0
    out, lse = TorchBackend(CPU).plan(rows).run(queries(2), keys, values, scale=SCALE)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_narrow_dtypes_keep_out_in_their_dtype_and_lse_in_float32(dtype, tolerance):
    rows = make_rows([6, 1], [(0, 40), (0, 33)], [tables_of("permuted", 10, 40), list(range(9))], 4, True)
    keys, values = make_store(160, dtype)
    q = queries(7, dtype)
    out, lse = TorchBackend(CPU).plan(rows).run(q, keys, values, scale=SCALE)
    want = oracle(rows, q.double(), keys.double(), values.double())
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), want[1], atol=20 * tolerance, rtol=0)


def test_queries_of_any_strides_are_accepted():
    rows = make_rows([3], [(0, 12)], [[5, 2, 8]], 4, True)
    keys, values = make_store(64)
    q = queries(3)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        TorchBackend(CPU).plan(rows).run(strided, keys, values, scale=SCALE), oracle(rows, q, keys, values)
    )


@pytest.mark.parametrize("soft_cap", [None, 4.0])
@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        make_rows([5, 3], [(0, 40), (2, 30)], [list(range(10)), [15, 3, 9, 1, 20, 11, 8, 2]], 4, True),
        make_rows([5, 3], [(0, 40), (2, 30)], [list(range(10)), [15, 3, 9, 1, 20, 11, 8, 2]], 4, True).within(6),
        make_rows([2, 4], [(0, 600), (0, 7)], [[*range(20, 30), *range(5, 15)], [2]], 32, False),
        make_rows([1] * 6, [(0, n) for n in (3, 9, 17, 0, 64, 30)], [[i, i + 8, i + 16] for i in range(6)], 32, False),
    ],
    ids=["causal", "window", "runs", "shared calls"],
)
def test_keys_in_fp8_are_the_numbers_they_say(rows, dtype, is_latent, soft_cap):
    keys, values = (x.to(dtype) for x in make_store(32 * 32, torch.float32))
    if is_latent:
        values, rows = keys[..., :V], of_latents(rows)
    plan, q = TorchBackend(CPU).plan(rows), queries(rows.num_queries, torch.float32)
    found = plan.run(q, keys, values, scale=SCALE, soft_cap=soft_cap)
    found = [x.clone() for x in found]
    wide = keys.float()
    want = plan.run(q, wide, wide[..., :V] if is_latent else values.float(), scale=SCALE, soft_cap=soft_cap)
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_of_a_store_in_fp8_no_more_is_cast_than_a_call_takes(monkeypatch):
    rows = make_rows([2], [(0, 12)], [[5, 2, 8]], 4, False)
    keys, values = (x.to(torch.float8_e4m3fn) for x in make_store(4096, torch.float32))
    cast = []
    to = torch.Tensor.to

    def noted(x, *args, **kwargs):
        cast.append(x.numel())
        return to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    TorchBackend(CPU).plan(rows).run(queries(2, torch.float32), keys, values, scale=SCALE)
    assert 0 < max(cast) <= 12 * K * D


def test_torch_names_this_backend_and_auto_where_no_other_can():
    assert make_backend("torch", CPU, AttentionNeeds(torch.float32, ())).name == "torch"
    for dtype in (torch.float64, torch.bfloat16):
        assert make_backend("auto", CPU, AttentionNeeds(dtype, ())).name == "torch"
    with pytest.raises(UserError, match='unknown backend "cudnn"'):
        make_backend("cudnn", CPU, AttentionNeeds(torch.float32, ()))


def of_latents(rows):
    return replace(rows, v_is_prefix_of_k=True)


def short_rows(num_keys, block_size=4, lo=0):
    """Rows of one query over scattered blocks, each with its own."""
    g = np.random.default_rng(0)
    tables, free = [], g.permutation(4096)
    for n in num_keys:
        tables.append(free[: -(-(lo + n) // block_size)].tolist())
        free = free[len(tables[-1]) :]
    return make_rows([1] * len(num_keys), [(lo, lo + n) for n in num_keys], tables, block_size, causal=False)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("lo", [0, 3])
def test_short_rows_that_share_a_call_see_their_own_keys_alone(lo, soft_cap):
    num_keys = [1, 2, 8, 9, 16, 17, 33, 63, 64, 65, 200, 5, 5]
    check(short_rows(num_keys, lo=lo), 4 * 4096, soft_cap=soft_cap)


def test_short_rows_stand_between_long_empty_and_many_query_ones():
    rows = make_rows(
        [1, 1, 3, 1, 1, 0, 1, 1],
        [(0, 5), (0, 0), (0, 40), (2, 6), (0, 80), (0, 0), (0, 7), (1, 2)],
        [[1, 0], [], list(range(10, 20)), [3, 4], list(range(20, 40)), [], [41, 40], [9]],
        4,
        causal=True,
    )
    check(rows, 200)


def test_rows_of_like_lengths_share_a_call_and_few_rows_do_not(monkeypatch):
    """What sharing is for: the kernel is called once for 40 rows."""
    shapes = []
    kernel = attention.flash_single_queries_cpu
    monkeypatch.setattr(
        "cpinfer.attention.backends.torch_backend.flash_single_queries_cpu",
        lambda q, k, v, n, **options: shapes.append(tuple(k.shape[:2])) or kernel(q, k, v, n, **options),
    )
    keys, values = make_store(4 * 4096, torch.float32)
    for num_keys in ([6] * 40, [6] * 3, [6, 40] * 20):
        rows = short_rows(num_keys)
        TorchBackend(CPU).plan(rows).run(queries(len(num_keys), torch.float32), keys, values, scale=SCALE)
    assert shapes == [(40, 6), (20, 6), (20, 40)]


def test_values_that_are_columns_of_the_keys_stay_such_in_a_shared_call():
    store, _ = make_store(4 * 4096)
    rows = short_rows([3, 9, 20, 21, 50])
    q = queries(5)
    out, lse = TorchBackend(CPU).plan(of_latents(rows)).run(q, store, store[..., :V], scale=SCALE)
    want = oracle(rows, q, store, store[..., :V])
    torch.testing.assert_close(out, want[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(lse, want[1], atol=TOLERANCE, rtol=0)
