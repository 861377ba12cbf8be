"""Attention states: merging is commutative and associative with an identity, and lse travels without rounding.

Peaked logits (std 3, one sink key) throughout: with flat ones an lse in the wrong base errs too little to be seen.
"""

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.ops.attention import dense_attention
from cpinfer.ops.states import count_sinks, merge_states, pack_states, unpack_states

T, H, D = 5, 3, 8
TOLERANCE = 1e-12  # of float64 states


def peaked(num_keys, seed=0):
    """q, k, v in float64 whose logits have std 3 and one key far above the rest."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(T, H, D, generator=g, dtype=torch.float64)
    k = 3 * torch.randn(num_keys, H, D, generator=g, dtype=torch.float64)
    k[num_keys // 3] = 4 * q.mean(dim=0)
    return q, k, torch.randn(num_keys, H, D, generator=g, dtype=torch.float64)


def state_of(q, k, v):
    return dense_attention(q, k, v, scale=1 / math.sqrt(D), causal=False)


def parts(bounds, seed=0):
    q, k, v = peaked(bounds[-1], seed)
    states = [state_of(q, k[a:b], v[a:b]) for a, b in itertools.pairwise(bounds)]
    return states, state_of(q, k, v)


def empty_state(dtype=torch.float64):
    return torch.zeros(T, H, D, dtype=dtype), torch.full((T, H), -torch.inf, dtype=dtype)


def difference(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_merged_parts_are_the_softmax_over_all_keys():
    for bounds in ([0, 7, 20], [0, 1, 2, 40], [0, 10, 10, 25], [0, 5, 6, 7, 30, 64]):
        states, whole = parts(bounds)
        assert difference(merge_states(states), whole) < TOLERANCE


def test_merging_is_commutative():
    states, _ = parts([0, 4, 17, 30])
    first = merge_states(states)
    for order in itertools.permutations(states):
        assert difference(merge_states(order), first) < TOLERANCE


def test_merging_is_associative():
    (a, b, c), _ = parts([0, 4, 17, 30])
    at_once = merge_states([a, b, c])
    assert difference(merge_states([merge_states([a, b]), c]), at_once) < TOLERANCE
    assert difference(merge_states([a, merge_states([b, c])]), at_once) < TOLERANCE


@given(
    bounds=st.lists(st.integers(0, 24), min_size=1, max_size=6).map(lambda cuts: [0, *sorted(cuts), 24]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_any_cut_merges_to_the_same_state(bounds, seed):
    states, whole = parts(bounds, seed)
    assert difference(merge_states(states), whole) < TOLERANCE
    assert difference(merge_states(states[::-1]), whole) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_empty_state_is_the_identity(dtype):
    states, _ = parts([0, 9])
    state = tuple(x.to(dtype) for x in states[0])
    for merged in (merge_states([state, empty_state(dtype)]), merge_states([empty_state(dtype), state])):
        assert torch.equal(merged[0], state[0])
        assert torch.equal(merged[1], state[1])


def test_one_state_merges_to_itself():
    states, whole = parts([0, 9])
    assert difference(merge_states(states), whole) == 0


def test_only_empty_states_merge_to_the_empty_state():
    out, lse = merge_states([empty_state(), empty_state(), empty_state()])
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_rows_without_keys_do_not_disturb_their_neighbours():
    (a, b), whole = parts([0, 8, 20])
    for out, lse in (a, b):
        out[2], lse[2] = 0, -torch.inf
    out, lse = merge_states([a, b])
    kept = [0, 1, 3, 4]
    assert difference((out[kept], lse[kept]), (whole[0][kept], whole[1][kept])) < TOLERANCE
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("which", ["out", "lse"])
def test_a_nan_in_any_state_comes_through(place, which):
    states, _ = parts([0, 8, 20])
    if which == "out":
        states[place][0][1, 2, 0] = torch.nan
    else:
        states[place][1][1, 2] = torch.nan
    out, lse = merge_states(states)
    assert out[1, 2].isnan().any()
    assert which == "out" or lse[1, 2].isnan()
    assert not out[0].isnan().any() and not lse[0].isnan().any()


def test_a_nan_is_not_taken_for_an_empty_state():
    broken = empty_state()
    broken[1][0, 0] = torch.nan
    assert merge_states([broken, empty_state()])[1][0, 0].isnan()


def test_huge_logits_neither_overflow_nor_vanish():
    states, whole = parts([0, 8, 20])
    for shift in (1e4, -1e4):
        merged = merge_states([(out, lse + shift) for out, lse in states])
        assert difference(merged, (whole[0], whole[1] + shift)) < 1e-9


def test_an_lse_in_base_2_does_not_pass_for_a_natural_one():
    """The control: FlashInfer's kernels return log2. Merging that as natural log must fail by orders of magnitude."""
    states, whole = parts([0, 20, 64])
    wrong = merge_states([(out, lse / math.log(2)) for out, lse in states])
    assert float((wrong[0] - whole[0]).abs().max()) > 1e-2 > 1e6 * TOLERANCE


def test_a_state_of_the_wrong_rank_does_not_pass():
    states, whole = parts([0, 20, 40, 64])
    wrong = merge_states([states[0], states[1], states[1]])
    assert float((wrong[0] - whole[0]).abs().max()) > 1e-2


def test_merged_outputs_keep_the_dtype_of_the_outputs():
    states, _ = parts([0, 8, 20])
    out, lse = merge_states([(out.bfloat16(), lse.float()) for out, lse in states])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


WIRES = [torch.float32, torch.bfloat16, torch.float16]


def bits(x):
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("wire", WIRES, ids=str)
@given(
    patterns=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4).map(
        lambda words: struct.unpack("<4i", struct.pack("<4I", *words))
    )
)
@settings(max_examples=60, deadline=None)
def test_lse_travels_bit_by_bit_whatever_its_bits(wire, patterns):
    lse = torch.tensor(patterns, dtype=torch.int32).view(torch.float32).reshape(2, 2)
    packed = pack_states(torch.zeros(2, 2, D), lse, wire)
    assert torch.equal(bits(unpack_states(packed, D)[1]), bits(lse))


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_packed_states_come_back_with_out_rounded_once(wire):
    g = torch.Generator().manual_seed(0)
    out, lse = torch.randn(2, T, H, D, generator=g), 30 * torch.randn(2, T, H, generator=g)
    lse[0, 0] = -torch.inf
    packed = pack_states(out, lse, wire)
    assert packed.dtype == wire
    assert packed.shape == (2, T, H, D + 4 // wire.itemsize)
    got_out, got_lse = unpack_states(packed, D)
    assert got_out.dtype == got_lse.dtype == torch.float32
    assert torch.equal(got_out, out.to(wire).float())
    assert torch.equal(bits(got_lse), bits(lse))


def test_strided_states_pack_like_contiguous_ones():
    out, lse = torch.randn(H, T, D).transpose(0, 1), torch.randn(H, T).transpose(0, 1)
    got = unpack_states(pack_states(out, lse, torch.bfloat16), D)
    assert torch.equal(got[0], out.bfloat16().float()) and torch.equal(got[1], lse)


def test_no_rows_pack_and_unpack_to_no_rows():
    out, lse = unpack_states(pack_states(torch.zeros(0, H, D), torch.zeros(0, H), torch.bfloat16), D)
    assert out.shape == (0, H, D) and lse.shape == (0, H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_lse_that_is_not_float32_is_refused(dtype):
    with pytest.raises(ValueError, match="float32 was wanted"):
        pack_states(torch.zeros(T, H, D), torch.zeros(T, H, dtype=dtype), torch.bfloat16)


# --- sinks ---

SINKS = torch.tensor([-2.0, 1.0, 9.0], dtype=torch.float64)


def sink_state(sinks=SINKS):
    return torch.zeros(T, H, D, dtype=torch.float64), sinks.expand(T, H)


def test_a_sink_counts_as_one_more_key_without_a_value():
    [state], _ = parts([0, 20])
    for sinks in (SINKS, SINKS - 30, SINKS + 30, torch.full_like(SINKS, -torch.inf)):
        merged, _ = merge_states([state, sink_state(sinks)])
        assert float((count_sinks(*state, sinks) - merged).abs().max()) < TOLERANCE


def test_sinks_are_the_softmax_over_keys_and_one_logit_more():
    """Straight from the definition: append the sink's logit, drop its column."""
    q, k, v = peaked(12)
    logits = torch.einsum("thd,shd->ths", q, k) / math.sqrt(D)
    weights = torch.softmax(torch.cat([logits, SINKS[None, :, None].expand(T, H, 1)], dim=-1), dim=-1)[..., :-1]
    want = torch.einsum("ths,shd->thd", weights, v)
    assert float((count_sinks(*state_of(q, k, v), SINKS) - want).abs().max()) < TOLERANCE


def test_a_sink_counted_once_per_shard_is_seen():
    """The control: it belongs after the last merge."""
    states, whole = parts([0, 7, 20])
    once = count_sinks(*whole, SINKS)
    twice = merge_states([(count_sinks(out, lse, SINKS), lse) for out, lse in states])[0]
    after = count_sinks(*merge_states(states), SINKS)
    assert float((after - once).abs().max()) < TOLERANCE
    assert float((twice - once).abs().max()) > 1e-3


def test_sinks_of_rows_without_keys_give_zeros():
    for sinks in (SINKS, torch.full_like(SINKS, 80.0), torch.full_like(SINKS, -80.0)):
        assert torch.equal(count_sinks(*empty_state(), sinks), empty_state()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sinks_of_any_dtype_keep_the_dtype_of_the_output(dtype):
    [(out, lse)], _ = parts([0, 20])
    exact = count_sinks(out, lse, SINKS)
    got = count_sinks(out.to(dtype), lse.float(), SINKS.to(dtype))
    assert got.dtype == dtype and got.shape == (T, H, D)
    assert float((got.double() - exact).abs().max()) < (3e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_nan_comes_through_sinks():
    [(out, lse)], _ = parts([0, 20])
    lse[1, 2] = torch.nan
    got = count_sinks(out, lse, SINKS)
    assert got[1, 2].isnan().all() and got[0].isfinite().all()
