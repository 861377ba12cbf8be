"""Attention of one row: the definition against a loop, the flash kernel against the definition, and its traps."""

import math

import pytest
import torch

from cpinfer.ops import attention
from cpinfer.ops.attention import dense_attention, flash_attention_cpu, hidden_keys

# Of outputs of size ~1. bfloat16 rounds its outputs to 8 bits, and flash rounds its weights once more.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
LSE_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-3}
KERNELS = [dense_attention, flash_attention_cpu]


def inputs(T, S, H, K, D, V, dtype=torch.float32, seed=0):
    """Peaked logits: std about 3 after scaling, and one sink key."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(T, H, D, generator=g)
    k = 3 * torch.randn(S, K, D, generator=g)
    v = torch.randn(S, K, V, generator=g)
    if S:
        k[S // 3] += 2
    return q.to(dtype), k.to(dtype), v.to(dtype)


def naive(q, k, v, scale, causal, window=None, soft_cap=None):
    """The definition as loops over queries, heads and keys, in float64."""
    (T, H, _), (S, K, V) = q.shape, v.shape
    out, lse = torch.zeros(T, H, V, dtype=torch.float64), torch.full((T, H), -torch.inf, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            head = h // (H // K)
            own = t + S - T  # the key of this query's own token
            seen = [s for s in range(S) if not causal or s <= own]
            if window is not None:
                seen = [s for s in seen if own - s < window]
            if not seen:
                continue
            logits = [scale * float(q[t, h].double() @ k[s, head].double()) for s in seen]
            if soft_cap is not None:
                logits = [soft_cap * math.tanh(x / soft_cap) for x in logits]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            lse[t, h] = top + math.log(sum(weights))
            for s, w in zip(seen, weights, strict=True):
                out[t, h] += w / sum(weights) * v[s, head].double()
    return out, lse


def assert_close(got, want, dtype):
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape and lse.shape == want_lse.shape
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), want_out.double(), atol=TOLERANCES[dtype], rtol=0)
    # Infinities must agree exactly; the rest relative to their size (lse is about 20 here).
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=20 * LSE_TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "T, S, H, K, D, V",
    [(1, 1, 1, 1, 4, 4), (4, 9, 4, 2, 8, 8), (5, 5, 6, 3, 8, 4), (3, 7, 4, 1, 4, 8), (6, 4, 2, 2, 8, 8)],
)
def test_dense_attention_is_the_definition(T, S, H, K, D, V, causal):
    q, k, v = inputs(T, S, H, K, D, V, torch.float64)
    assert_close(
        dense_attention(q, k, v, scale=0.4, causal=causal), naive(q, k, v, 0.4, causal), torch.float64
    )  # T > S included: queries before every key see nothing


SHAPES = [
    # T, S, H, K, D, V
    (1, 1, 1, 1, 8, 8),
    (1, 50, 8, 2, 16, 16),
    (1, 300, 4, 4, 16, 16),
    (1, 33, 8, 1, 16, 8),
    (7, 7, 4, 2, 16, 16),
    (5, 40, 6, 3, 16, 16),
    (64, 64, 4, 4, 32, 32),
    (33, 130, 8, 2, 16, 16),
    (16, 48, 4, 1, 16, 8),
    (16, 48, 4, 2, 8, 16),
    (2, 3, 2, 1, 5, 3),
]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_flash_kernel_is_dense_attention(shape, causal, dtype):
    q, k, v = inputs(*shape, dtype)
    scale = 1 / math.sqrt(shape[4])
    got = flash_attention_cpu(q, k, v, scale=scale, causal=causal)
    want = dense_attention(q.double(), k.double(), v.double(), scale=scale, causal=causal)
    assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_the_comparison_would_see_one_key_too_few(dtype):
    """The control of the tolerances above: the smallest mistake of a mask is far outside of them."""
    q, k, v = inputs(16, 48, 4, 2, 16, 16, dtype)
    got = flash_attention_cpu(q, k[:-1], v[:-1], scale=0.25, causal=True)
    want = dense_attention(q.double(), k.double(), v.double(), scale=0.25, causal=True)
    with pytest.raises(AssertionError):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("attend", KERNELS)
def test_causal_is_aligned_to_the_last_key(attend):
    q, k, v = inputs(3, 10, 2, 2, 8, 8)
    out, lse = attend(q, k, v, scale=0.3, causal=True)
    for t in range(3):
        seen = slice(0, 10 - 3 + t + 1)
        want = dense_attention(q[t : t + 1], k[seen], v[seen], scale=0.3, causal=False)
        torch.testing.assert_close((out[t : t + 1], lse[t : t + 1]), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attend", KERNELS)
def test_a_mask_aligned_to_the_first_key_would_be_seen(attend):
    q, k, v = inputs(3, 10, 2, 2, 8, 8)
    out, _ = attend(q, k, v, scale=0.3, causal=True)
    top_left, _ = dense_attention(q, k[:3], v[:3], scale=0.3, causal=True)
    assert float((out - top_left).abs().max()) > 0.1


@pytest.mark.parametrize("attend", KERNELS)
def test_query_head_h_reads_kv_head_h_over_group_size(attend):
    q, k, v = inputs(4, 6, 6, 2, 8, 8)
    out, lse = attend(q, k, v, scale=0.3, causal=True)
    for h in range(6):
        head = slice(h // 3, h // 3 + 1)
        want = dense_attention(q[:, h : h + 1], k[:, head], v[:, head], scale=0.3, causal=True)
        torch.testing.assert_close((out[:, h : h + 1], lse[:, h : h + 1]), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_without_keys_the_state_is_empty(attend, causal, dtype):
    q, k, v = inputs(3, 0, 4, 2, 8, 6, dtype)
    out, lse = attend(q, k, v, scale=1.0, causal=causal)
    assert out.shape == (3, 4, 6) and out.dtype == dtype and (out == 0).all()
    assert lse.shape == (3, 4) and (lse == -torch.inf).all()


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("S", [0, 5])
def test_without_queries_nothing_comes_back(attend, S):
    q, k, v = inputs(0, S, 4, 2, 8, 6)
    out, lse = attend(q, k, v, scale=1.0, causal=False)
    assert out.shape == (0, 4, 6) and lse.shape == (0, 4)


def test_the_flash_kernel_refuses_heads_that_do_not_divide():
    q, k, v = inputs(3, 5, 4, 3, 8, 8)
    with pytest.raises(ValueError, match="4 query heads do not divide over 3 KV heads"):
        flash_attention_cpu(q, k, v, scale=1.0, causal=False)


def test_the_flash_kernel_refuses_causal_queries_that_would_see_nothing():
    q, k, v = inputs(5, 3, 2, 2, 8, 8)
    with pytest.raises(ValueError, match="5 queries over 3 keys"):
        flash_attention_cpu(q, k, v, scale=1.0, causal=True)
    flash_attention_cpu(q, k, v, scale=1.0, causal=False)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_strided_keys_and_queries_are_read_where_they_lie(T, causal):
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(30, 2, 24, generator=g)  # K and V of a token side by side, as they travel
    k, v = fused[7:20, :, :16], fused[7:20, :, 16:]
    q = torch.randn(4, T, 16, generator=g).transpose(0, 1)  # heads first, as models hand queries over
    assert not (k.is_contiguous() or v.is_contiguous())
    got = flash_attention_cpu(q, k, v, scale=0.3, causal=causal)
    want = dense_attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=0.3, causal=causal)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_a_nan_among_the_keys_surfaces():
    q, k, v = inputs(3, 8, 2, 2, 8, 8)
    k[4, 1] = torch.nan
    for attend in KERNELS:
        out, lse = attend(q, k, v, scale=0.3, causal=False)
        assert out[:, 1].isnan().all() and lse[:, 1].isnan().all()
        assert not out[:, 0].isnan().any()


# --- windows, soft caps, values that are a prefix of keys, tiles ---


def test_a_window_hides_from_a_query_all_but_its_last_keys():
    for T in range(5):
        for S in range(6):
            for at in range(-2, 5):
                for window in (None, 1, 2, 3, 9):
                    hidden = hidden_keys(T, S, at, window, torch.device("cpu"))
                    for i in range(T):
                        own = at + i
                        first = 0 if window is None else max(0, own - window + 1)
                        assert [s for s in range(S) if not hidden[i, s]] == list(range(first, min(S, own + 1)))


@pytest.mark.parametrize("soft_cap", [None, 2.0, 50.0])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize(
    "T, S, H, K, D, V", [(1, 1, 1, 1, 4, 4), (1, 6, 2, 1, 4, 4), (4, 4, 4, 2, 8, 4), (3, 7, 4, 2, 4, 6)]
)
def test_dense_attention_under_a_window_and_a_soft_cap_is_the_definition(T, S, H, K, D, V, window, soft_cap):
    q, k, v = inputs(T, S, H, K, D, V, torch.float64)
    got = dense_attention(q, k, v, scale=0.4, causal=True, window=window, soft_cap=soft_cap)
    assert_close(got, naive(q, k, v, 0.4, True, window, soft_cap), torch.float64)


def test_a_soft_cap_without_a_mask_is_the_definition():
    q, k, v = inputs(3, 6, 4, 2, 8, 4, torch.float64)
    got = dense_attention(q, k, v, scale=0.4, causal=False, soft_cap=1.5)
    assert_close(got, naive(q, k, v, 0.4, False, None, 1.5), torch.float64)
    assert float((got[0] - dense_attention(q, k, v, scale=0.4, causal=False)[0]).abs().max()) > 0.1


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 to 8 queries, so that short rows have many."""
    monkeypatch.setattr(attention, "MIN_WINDOW_TILE", 3)
    monkeypatch.setattr(attention, "MAX_WINDOW_TILE", 8)


WINDOWED_ROWS = [
    (1, 1),
    (1, 2),
    (1, 30),
    (2, 2),
    (3, 3),
    (4, 4),
    (7, 9),
    (8, 8),
    (9, 9),
    (9, 40),
    (16, 17),
    (25, 25),
    (25, 60),
]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8, 9, 12, 24, 25, 26, 60])
def test_the_flash_kernel_under_a_window_is_dense_attention(small_tiles, window):
    for T, S in WINDOWED_ROWS:
        q, k, v = inputs(T, S, 4, 2, 8, 8, torch.float64)
        got = flash_attention_cpu(q, k, v, scale=0.4, causal=True, window=window)
        assert_close(got, dense_attention(q, k, v, scale=0.4, causal=True, window=window), torch.float64)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_windows_keep_the_precision_of_every_dtype(small_tiles, dtype):
    for T, S, window in ((1, 20, 5), (13, 20, 5), (20, 20, 11)):
        q, k, v = inputs(T, S, 4, 2, 16, 8, dtype)
        got = flash_attention_cpu(q, k, v, scale=0.25, causal=True, window=window)
        wide = (x.double() for x in (q, k, v))
        assert_close(got, dense_attention(*wide, scale=0.25, causal=True, window=window), dtype)


@pytest.mark.parametrize("off", [-1, 1])
def test_the_comparison_would_see_a_window_that_is_off_by_one(small_tiles, off):
    for T, S in ((1, 30), (9, 40), (25, 25)):
        q, k, v = inputs(T, S, 4, 2, 8, 8)
        got = flash_attention_cpu(q, k, v, scale=0.4, causal=True, window=6 + off)
        with pytest.raises(AssertionError):
            assert_close(got, dense_attention(q, k, v, scale=0.4, causal=True, window=6), torch.float32)


def test_windowed_tiles_have_their_real_size_and_read_only_keys_that_some_query_sees(monkeypatch):
    """Keys outside hold NaN: what no query of a tile sees is not even read under a mask."""
    assert attention.MIN_WINDOW_TILE < attention.MAX_WINDOW_TILE
    calls = []
    flash = attention._flash

    def spy(q, k, v, scale, **mask):
        calls.append((len(q), len(k)))
        return flash(q, k, v, scale, **mask)

    monkeypatch.setattr(attention, "_flash", spy)
    for window, tile in ((10, 64), (100, 100), (2000, 512)):
        T, S = 600, 3000
        q, k, v = inputs(T, S, 1, 1, 8, 8)
        k[: S - T - window + 1] = torch.nan
        v[: S - T - window + 1] = torch.nan
        calls.clear()
        out, _ = flash_attention_cpu(q, k, v, scale=0.3, causal=True, window=window)
        assert out.isfinite().all()
        sizes = [min(tile, T - first) for first in range(0, T, tile)]
        assert calls == [(n, n + window - 1) for n in sizes]


def test_values_that_begin_elsewhere_are_not_taken_for_a_prefix():
    q, k, _ = inputs(4, 20, 4, 1, 12, 8)
    got = flash_attention_cpu(q, k, k[..., 2:10], scale=0.3, causal=True)
    want = dense_attention(q, k, k[..., 2:10].clone(), scale=0.3, causal=True)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scores", [1, 50, 200, 10**6])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 1), (True, 4)])
@pytest.mark.parametrize("T, S", [(7, 7), (5, 13), (9, 4), (3, 0), (1, 6)])
def test_dense_attention_in_tiles_of_queries_is_that_of_all_at_once(monkeypatch, T, S, causal, window, scores):
    q, k, v = inputs(T, S, 4, 2, 8, 4, torch.float64)
    whole = dense_attention(q, k, v, scale=0.4, causal=causal, window=window, soft_cap=5.0)
    monkeypatch.setattr(attention, "DENSE_TILE_SCORES", scores)
    tiles = []
    tile = attention._dense_tile
    monkeypatch.setattr(attention, "_dense_tile", lambda q, k, *rest: tiles.append(len(q)) or tile(q, k, *rest))
    got = dense_attention(q, k, v, scale=0.4, causal=causal, window=window, soft_cap=5.0)
    assert_close(got, whole, torch.float64)
    assert_close(got, naive(q, k, v, 0.4, causal, window, 5.0), torch.float64)
    assert sum(tiles) == T and all(n == 1 or n * S * 4 <= scores for n in tiles)
