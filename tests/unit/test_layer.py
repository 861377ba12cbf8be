"""Latents: absorbed queries over latents are plain queries over the keys and values that latents expand to."""

import pytest
import torch

from cpinfer.attention.layer import AttentionLayer, LatentLayer
from cpinfer.ops.attention import dense_attention

T, S, H, C, R, N, V = 4, 9, 6, 10, 4, 8, 5
TOLERANCE = 1e-12


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def space():
    return LatentLayer(0, 1.0, w_k=random(H, N, C, seed=1), w_v=random(H, V, C, seed=2))


Q, LATENTS = random(T, H, N + R, seed=3), random(S, 1, C + R, seed=4)


def test_absorbed_queries_have_with_latents_the_logits_that_queries_have_with_keys(space):
    keys, _ = space.expand(LATENTS, LATENTS[..., :C])
    want = torch.einsum("thd,shd->ths", Q, keys)
    got = torch.einsum("thd,sd->ths", space.absorb(Q), LATENTS[:, 0])
    torch.testing.assert_close(got, want, atol=TOLERANCE * float(want.abs().max()), rtol=0)


def test_projected_latents_are_the_expanded_values_under_any_weights(space):
    weights = torch.softmax(random(T, H, S, seed=5), dim=-1)
    _, values = space.expand(LATENTS, LATENTS[..., :C])
    want = torch.einsum("ths,shv->thv", weights, values)
    got = space.project(torch.einsum("ths,sc->thc", weights, LATENTS[:, 0, :C]))
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_expanded_heads_are_maps_of_the_latent_with_the_rotated_key_behind(space):
    """Head by head and token by token, as the paper writes it."""
    keys, values = space.expand(LATENTS, LATENTS[..., :C])
    assert keys.shape == (S, H, N + R) and values.shape == (S, H, V)
    for s in range(S):
        latent, rotated = LATENTS[s, 0, :C], LATENTS[s, 0, C:]
        for h in range(H):
            torch.testing.assert_close(keys[s, h, :N], space.w_k[h] @ latent, atol=TOLERANCE, rtol=0)
            assert torch.equal(keys[s, h, N:], rotated)
            torch.testing.assert_close(values[s, h], space.w_v[h] @ latent, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_latents_is_attention_to_what_they_expand_to(space, causal):
    out, lse = dense_attention(space.absorb(Q), LATENTS, LATENTS[..., :C], scale=0.05, causal=causal)
    want_out, want_lse = dense_attention(Q, *space.expand(LATENTS, LATENTS[..., :C]), scale=0.05, causal=causal)
    torch.testing.assert_close(space.project(out), want_out, atol=1e-11, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-11, rtol=0)


@pytest.mark.parametrize("num", [0, 1])
def test_no_tokens_and_one_token_have_the_shapes_of_many(space, num):
    keys, values = space.expand(LATENTS[:num], LATENTS[:num, :, :C])
    assert keys.shape == (num, H, N + R) and values.shape == (num, H, V)
    assert space.absorb(Q[:num]).shape == (num, H, C + R)
    assert space.project(random(num, H, C, seed=6)).shape == (num, H, V)


def test_what_is_merged_in_float32_is_projected_in_float32():
    """Merged states are wider than the weights; rounding them first would lose what the merge kept."""
    space = LatentLayer(0, 1.0, w_k=random(H, N, C, seed=1), w_v=random(H, V, C, seed=2)).to(torch.bfloat16)
    out = random(T, H, C, seed=7).float()
    got = space.project(out)
    assert got.dtype == torch.float32
    want = torch.einsum("thc,hvc->thv", out.double(), space.w_v.double())
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_a_layer_of_heads_caches_what_its_queries_attend_to():
    layer, q, k, v = AttentionLayer(0, 1.0), random(T, H, C, seed=1), random(S, 1, C, seed=2), random(S, 1, V, seed=3)
    assert layer.absorb(q) is q and layer.project(q) is q and layer.to(torch.bfloat16) is layer
    assert all(a is b for a, b in zip(layer.expand(k, v), (k, v), strict=True)) and layer.v_dim(v) == V


def test_a_layer_hands_its_scale_and_soft_cap_to_what_was_planned():
    class Planned:
        def run(self, q, keys, values, *, scale, soft_cap):
            return q, keys, values, scale, soft_cap

    q, k, v = object(), object(), object()
    assert AttentionLayer(3, 0.25, soft_cap=7.0).run(Planned(), q, k, v) == (q, k, v, 0.25, 7.0)
    assert AttentionLayer(3, 0.25).run(Planned(), q, k, v) == (q, k, v, 0.25, None)
