import pytest

from cpinfer.layout.capacity import DTYPE_BYTES, KVLayout, PoolSize
from cpinfer.layout.shards import KVSharding

GIB = 2**30


@pytest.mark.parametrize(
    "gib, dcp, tokens, sequences",
    [(12.674468994140625, 1, 949_296, 115.9), (12.65887451171875, 2, 1_896_256, 231.5)],
)
def test_a_budget_holds_the_known_number_of_tokens(gib, dcp, tokens, sequences):
    """28 layers, one KV head of 128 per rank, bfloat16, blocks of 16."""
    per_token = KVLayout(num_heads=1, k_dim=128, v_dim=128).bytes_per_token(28, "bfloat16")
    pool = PoolSize.from_bytes(int(gib * GIB), per_token, KVSharding(dcp, 16, 16))
    assert pool.capacity_tokens == tokens
    assert pool.max_concurrency(8192) == pytest.approx(sequences, abs=0.05)


@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_the_longest_sequence_grows_with_the_number_of_shards(num_shards):
    for num_bytes in (GIB // 10, GIB, 3 * GIB + 12345):
        one = PoolSize.from_bytes(num_bytes, 14336, KVSharding(1, 16, 16))
        many = PoolSize.from_bytes(num_bytes, 14336, KVSharding(num_shards, 16, 16))
        assert many.capacity_tokens >= 0.98 * num_shards * one.capacity_tokens


def test_a_sequence_as_long_as_the_capacity_fits_and_one_token_more_does_not():
    for sharding in (KVSharding(1, 16, 16), KVSharding(4, 8, 16), KVSharding(2, 1, 16)):
        pool = PoolSize(num_blocks=7, sharding=sharding)
        assert sharding.num_blocks(pool.capacity_tokens) == 7
        assert sharding.num_blocks(pool.capacity_tokens + 1) == 8


def test_the_pool_never_exceeds_its_budget_and_wastes_less_than_a_block():
    for num_bytes in (0, 1, 14336 * 16 - 1, 14336 * 16, 10**9):
        used = PoolSize.from_bytes(num_bytes, 14336, KVSharding(2, 16, 16)).num_blocks * 14336 * 16
        assert 0 <= num_bytes - used < 14336 * 16


def test_mla_pays_for_its_latent_once():
    mla = KVLayout(num_heads=1, k_dim=576, v_dim=512, v_is_prefix_of_k=True)
    assert mla.width == mla.values_per_token == 576
    assert mla.bytes_per_token(61, "bfloat16") == 61 * 576 * 2 == 70_272
    assert KVLayout(num_heads=2, k_dim=576, v_dim=512).width == 576 + 512


def test_in_fp8_a_budget_holds_twice_as_many_tokens_as_in_half_precision():
    kv, sharding = KVLayout(8, 128, 128), KVSharding(4, 16, 16)
    tokens = {
        dtype: PoolSize.from_bytes(2**30, kv.bytes_per_token(32, dtype), sharding).capacity_tokens
        for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    }
    assert tokens["float8_e4m3fn"] == tokens["float8_e5m2"] == 2 * tokens["bfloat16"] > 0


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_per_token_are_layers_times_heads_times_both_dims_times_width(dtype):
    assert KVLayout(4, 128, 64).bytes_per_token(3, dtype) == 3 * 4 * (128 + 64) * DTYPE_BYTES[dtype]
