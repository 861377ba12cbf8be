"""Attention of one row: the definition against a loop, the flash kernel against the definition, and its traps."""

import math

import pytest
import torch

from cpinfer.ops.attention import dense_attention, flash_attention_cpu

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


def naive(q, k, v, scale, causal):
    """The definition as loops over queries, heads and keys, in float64."""
    (T, H, _), (S, K, V) = q.shape, v.shape
    out, lse = torch.zeros(T, H, V, dtype=torch.float64), torch.full((T, H), -torch.inf, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            head = h // (H // K)
            seen = [s for s in range(S) if not causal or s <= t + S - T]
            if not seen:
                continue
            logits = [scale * float(q[t, h].double() @ k[s, head].double()) for s in seen]
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
