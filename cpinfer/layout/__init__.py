"""Where everything goes: ranks, heads, KV shards, prefill parts and plans. numpy and the standard library only."""
