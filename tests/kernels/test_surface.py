"""Everything that the backend asks of FlashInfer, by its own kernels, against dense attention: out and lse."""

from __future__ import annotations

import pytest
from attention_cases import BF16, CACHED, CAUSAL, DECODE, E4M3, ROWS, Heads, backend_of, check, rows_of

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.layout.capacity import KVLayout
from interpreted_cuda.modules import LAUNCHES
from interpreted_cuda.tensors import CUDA

pytestmark = pytest.mark.timeout(900)  # kernels compile when they are first used

GQA = Heads(8, KVLayout(2, 128, 128))
MHA = Heads(4, KVLayout(4, 128, 128))
EXPANDED = Heads(4, KVLayout(4, 192, 128))
LATENT = Heads(16, KVLayout(1, 576, 512, v_is_prefix_of_k=True))
SMALL = Heads(8, KVLayout(2, 64, 64))
CAPPED = Heads(8, KVLayout(2, 64, 64), soft_cap=20.0)
EIGHT_BITS = Heads(8, KVLayout(2, 128, 128), key_dtype=E4M3)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("name", ROWS)
def test_grouped_heads_of_128(name: str, packed: bool) -> None:
    assert not check(ROWS[name], GQA, packed=packed)


@pytest.mark.parametrize(
    ("heads", "rows"),
    [
        (Heads(28, KVLayout(4, 128, 128)), rows_of([9, 3], [60, 3], 16, causal=True)),
        (Heads(16, KVLayout(1, 128, 128)), rows_of([1, 1], [60, 3], 16, causal=False)),
        (Heads(32, KVLayout(1, 128, 128)), rows_of([1, 1], [60, 3], 16, causal=False)),
        (Heads(8, KVLayout(1, 128, 128)), ROWS["prefill, heads and tails"]),
    ],
    ids=["28 over 4", "16 over 1", "32 over 1", "8 over 1"],
)
def test_groups_of_other_sizes(heads: Heads, rows: object) -> None:
    assert not check(rows, heads)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("name", [*DECODE, "only empty rows"])
def test_decode_where_each_query_head_has_its_own_keys_takes_no_tensor_cores(name: str, packed: bool) -> None:
    assert not check(ROWS[name], MHA, packed=packed)
    assert ("BatchDecode" in "".join(LAUNCHES)) == name.startswith("decode")


@pytest.mark.parametrize("name", ROWS)
def test_keys_and_values_of_different_dims(name: str) -> None:
    assert not check(ROWS[name], EXPANDED)


@pytest.mark.parametrize("num_heads", [5, 16])
@pytest.mark.parametrize("name", CACHED)
def test_latents(name: str, num_heads: int) -> None:
    assert not check(ROWS[name], Heads(num_heads, LATENT.layout))


@pytest.mark.parametrize("name", ["decode", "decode, keys split", "context, one row empty"])  # the others are minutes
def test_latents_of_128_heads(name: str) -> None:
    assert not check(ROWS[name], Heads(128, LATENT.layout))


@pytest.mark.parametrize("window", [1, 3, 16, 100])
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("heads", [SMALL, CAPPED], ids=["plain", "capped"])
def test_windows_with_a_soft_cap_and_without(heads: Heads, name: str, window: int) -> None:
    assert not check(ROWS[name].within(window), heads)


@pytest.mark.parametrize("name", ["prefill, heads and tails", "decode", "context, one row empty"])
def test_heads_of_64(name: str) -> None:
    assert not check(ROWS[name], SMALL)


@pytest.mark.parametrize("name", CACHED)
def test_keys_of_eight_bits(name: str) -> None:
    assert not check(ROWS[name], EIGHT_BITS)


@pytest.mark.parametrize("heads", [GQA, MHA, LATENT, EXPANDED], ids=["gqa", "mha", "latent", "expanded"])
@pytest.mark.parametrize("single_tokens", [False, True])
def test_a_plan_of_fixed_size_takes_other_rows(heads: Heads, single_tokens: bool) -> None:
    num_blocks = 60
    plan = backend_of(heads).fixed_plan(FixedSize(4, 700), single_tokens=single_tokens)
    for kv_lens in ([18, 0, 6, 8], [1, 0, 0, 5], [0, 0, 7, 200], [0] * 4, [300, 41, 7, 17], [3] * 4):
        rows = rows_of([1] * 4, kv_lens, 16, causal=False, seed=sum(kv_lens), num_blocks=num_blocks).over(heads.layout)
        if single_tokens:  # as windows leave them
            rows = rows.above(rows.kv_hi - 3)
        plan.update(rows)
        assert not check(rows, heads, plan=plan, num_slots=16 * num_blocks), kv_lens


def test_keys_of_long_rows_are_split_and_merged() -> None:
    assert not check(ROWS["decode, keys split"], GQA)
    assert "Merge" in "".join(LAUNCHES)


def test_the_check_at_start_passes() -> None:
    needs = AttentionNeeds(BF16, ((8, GQA.layout), (4, MHA.layout), (16, LATENT.layout), (4, EXPANDED.layout)))
    check_backend(backend_of(GQA), needs, CUDA)
