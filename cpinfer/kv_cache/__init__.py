"""Where KV lies on a rank: the paged store, the blocks of a pool, prefixes that are kept, and the home of a request."""
