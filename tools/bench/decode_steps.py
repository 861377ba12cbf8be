"""Decode steps over a long context that nobody prefilled: the cache is filled with random keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds, StepBackends
from cpinfer.attention.backends.registry import make_backend
from cpinfer.config import EngineConfig, SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.step import Step
from cpinfer.engine.step_factory import make_step_runner
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.shards import KVSharding


class DecodeSteps:
    """The same decode step again and again, of `batch` sequences with `context_tokens` cached each.

    K and V are functions of (layer, sequence, position), so every sharding of them holds the same sequence.
    `local_lens` are the keys that each shard attends to per sequence, the new token's included.
    """

    def __init__(
        self, runner: Any, topology: cpinfer.Topology, context_tokens: int, batch: int, block_size: int
    ) -> None:
        grid, shard = topology.grid, topology.kv_shard
        config = EngineConfig(dtype="float32", block_size=block_size)
        sharding = KVSharding(grid.dcp_size, block_size, block_size)
        self.local_lens = [sharding.local_len(context_tokens + 1, s) for s in range(grid.dcp_size)]
        per_sequence = sharding.num_blocks(context_tokens + 1)
        tables = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(batch)]
        layout, num_blocks = runner.spec.kv_layout(runner.spec.num_kv_heads), per_sequence * batch
        cache = PagedKVCache(layout, runner.spec.num_layers, num_blocks, block_size, runner.dtype, runner.device)
        positions = sharding.positions(context_tokens, shard)
        for i, block_table in enumerate(tables):
            slots = torch.from_numpy(sharding.slots(np.asarray(block_table), positions, shard))
            for layer in range(runner.spec.num_layers):
                generator = torch.Generator().manual_seed(1000 * layer + i)
                shape = (2, context_tokens, layout.num_heads, layout.k_dim)
                k, v = torch.randn(shape, generator=generator)[:, positions]
                cache.write(layer, slots, (k, v))
        backend = make_backend("auto", runner.device, AttentionNeeds(runner.dtype, ()))
        backends = StepBackends(backend, backend)
        self._steps = make_step_runner(runner, topology, config, sharding, backends, cache, StopChecker((), None))
        params = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
        sequences = []
        for i, block_table in enumerate(tables):
            sequence = SampledRequest(Prompt(i, str(i), (0,) * context_tokens), 0, params, params.max_new_tokens)
            sequence.blocks = block_table
            # Its first token is there: the step computes it, at position `context_tokens`, and samples the second.
            sequence.sampled = [SampledToken(i, 0.0, 0.0)]
            sequences.append(sequence)
        self._step = Step((), tuple(sequences))

    def run(self) -> list[SampledToken]:
        """Each sequence's next token; nothing moves on. Collective over the topology."""
        return self._steps.run(self._step).sampled
