"""The blocks of one home: the pool, and the prefixes that give way."""

import pytest

from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.shards import KVSharding

SHARDING = KVSharding(1, 4, 4)


@pytest.mark.parametrize("enabled", [True, False])
def test_emptied_a_home_is_as_it_was_made_and_the_old_one_as_it_is(enabled):
    home = KVHome(6, SHARDING, enable_prefix_caching=enabled)
    blocks = home.take(4)
    home.prefixes.insert([b"a", b"b"], blocks)
    emptied = home.emptied()
    assert emptied.pool.num_free == emptied.pool.num_blocks == 6 and len(emptied.prefixes) == 0
    emptied.prefixes.insert([b"a", b"b"], emptied.take(2))
    assert len(emptied.prefixes) == len(home.prefixes) == (2 if enabled else 0)
    assert home.pool.num_free == 2
    home.check_integrity(blocks, {})
    with pytest.raises(ValueError):
        emptied.check_integrity(blocks, {})
