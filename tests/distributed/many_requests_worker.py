"""Many requests of random lengths through a pool that holds few of them; rank 0 prints what became of them.

torchrun --nproc-per-node 2 tests/distributed/many_requests_worker.py NUM_REQUESTS
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter

import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model


def main(num_requests: int) -> None:
    launch = Launch.from_environ(os.environ)
    rng = random.Random(0)
    shared = [rng.randrange(128) for _ in range(100)]
    prompts = []
    for _ in range(num_requests // 2):
        own = [rng.randrange(128) for _ in range(rng.randint(1, 60))]
        prompts.append(shared[: rng.choice((0, 0, 50, 100))] + own)
    each = [SamplingParams(n=2, max_new_tokens=rng.randint(1, 24), seed=1) for _ in prompts]
    # A token takes 256 bytes on each rank here: this is room for 64 blocks of 2 x 8 tokens, some 8 sequences.
    config = parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": 2,
            "block_size": 8,
            "cp_kv_cache_interleave_size": 3,
            "kv_cache_gib": 64 * 8 * 256 / 2**30,
            "max_num_batched_tokens": 96,
        }
    )
    with default_group(launch):
        topology = cpinfer.Topology.from_world(RankGrid(pcp_size=2, dcp_size=2))
        with cpinfer.attach(make_model(FAMILIES["llama"]), topology, config) as engine:
            # The engine checks its pool when the stream ends: a leaked block would raise here.
            results = engine.generate(prompts, each)
            stats = engine.stats
        topology.close()
    if launch.rank == 0:
        seen = Counter((r.prompt_index, r.sample_index) for r in results)
        wanted = {(i, s) for i in range(len(prompts)) for s in range(2)}
        print(
            json.dumps(
                {
                    "num_samples": len(results),
                    "each_once": set(seen) == wanted and set(seen.values()) == {1},
                    "lengths_right": all(len(r.token_ids) == each[r.prompt_index].max_new_tokens for r in results),
                    "num_preemptions": stats.num_preemptions,
                    "num_cached_prefill_tokens": stats.num_cached_prefill_tokens,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
