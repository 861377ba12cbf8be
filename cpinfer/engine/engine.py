"""The engine: a model attached to a topology, a KV pool, and the loop that runs steps until all samples are done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.backends.base import make_backend
from cpinfer.cache.paged_kv_cache import PagedKVCache
from cpinfer.comm.topology import Topology
from cpinfer.config import Config, SamplingParams
from cpinfer.engine.agreement import agree_on_tokens, smallest
from cpinfer.engine.prompts import PromptLike, as_prompt, check_prompt
from cpinfer.engine.request import RolloutResult, SampledToken, Sequence
from cpinfer.engine.sampling import sample_tokens
from cpinfer.engine.scheduler import Scheduler, Step
from cpinfer.engine.stopping import Stopping
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.layout.decode import plan_decode
from cpinfer.layout.pool import BlockPool
from cpinfer.layout.prefill import StepCost, deal_prompts, plan_prefill, split_prompts
from cpinfer.layout.shards import KVSharding
from cpinfer.models.attention_steps import DecodeStep, PrefillStep
from cpinfer.models.runner import ModelRunner
from cpinfer.models.spec import ModelSpec

CPU_KV_CACHE_GIB = 0.25
CUDA_KV_CACHE_SHARE = 0.5
WEIGHTS_VERSION = 0


class Engine:
    """Generates with an attached model. Every rank of a dp replica holds one and makes the same calls on it.

    Made by `cpinfer.attach`, and valid inside its block. `kv_capacity_tokens` is how long one sequence could be.
    """

    def __init__(self, runner: ModelRunner, topology: Topology, config: Config, tokenizer: Any | None) -> None:
        self._runner = runner
        self._topology = topology
        self._config = config
        self._tokenizer = tokenizer
        self._stopping = Stopping(runner.spec.eos_token_ids, tokenizer)
        self._backend = make_backend(config.backend, runner.device)
        self._cost = StepCost(pairs_per_token=runner.spec.pairs_per_token)
        self._wire_dtype = runner.dtype if config.cp_wire_dtype == "auto" else getattr(torch, config.cp_wire_dtype)
        self._pool_size = self._agree_on_pool()
        self._sharding = self._pool_size.sharding
        self._pool = BlockPool(self._pool_size.num_blocks)
        self._cache = PagedKVCache(
            runner.spec.kv_layout(topology.grid.tp_size),
            runner.spec.num_layers,
            self._pool_size.num_blocks,
            config.block_size,
            runner.dtype,
            runner.device,
        )

    @property
    def kv_capacity_tokens(self) -> int:
        return self._pool_size.capacity_tokens

    def generate(self, prompts: Iterable[PromptLike], sampling: SamplingParams | None = None) -> list[RolloutResult]:
        """All samples of all prompts, in order of prompt and sample. An empty list of prompts gives an empty list."""
        results = list(self.stream(prompts, sampling))
        return sorted(results, key=lambda r: (r.prompt_index, r.sample_index))

    def stream(
        self,
        prompts: Iterable[PromptLike],
        sampling: SamplingParams | None = None,
        skip: frozenset[tuple[int, int]] = frozenset(),
    ) -> Iterator[RolloutResult]:
        """Samples as they finish, on every rank alike.

        A prompt is text, a list of token ids, a `Prompt`, or an object with the keys of an input line. `sampling`
        defaults to the config's. `skip` holds (prompt_index, sample_index) that are not wanted. UserError, before
        anything runs, for a prompt that can never run.
        """
        params = sampling or self._config.sampling
        if params.stop and self._tokenizer is None:
            raise UserError("stop strings need a tokenizer: give one to attach, or use stop_token_ids.")
        scheduler = Scheduler(
            self._pool,
            self._sharding,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
        )
        for index, given in enumerate(prompts):
            prompt = as_prompt(given, index, self._tokenizer)
            check_prompt(prompt, params, self._runner.spec, self._config, self._pool_size)
            room = self._runner.spec.max_positions - len(prompt.token_ids)
            for sample_index in range(params.n):
                if (prompt.index, sample_index) not in skip:
                    scheduler.add(Sequence(prompt, sample_index, params, min(params.max_new_tokens, room)))
        try:
            while (step := scheduler.schedule()) is not None:
                tokens = self._prefill(step) if step.is_prefill else self._decode(step)
                now = time.perf_counter()
                finished = scheduler.commit(step, tokens, self._stopping.stops)
                for sequence in step.sequences:
                    sequence.first_token_s = sequence.first_token_s or now
                for sequence in finished:
                    sequence.finished_s = now
                    yield self._result(sequence)
        finally:
            scheduler.abort_all()
            self._pool.check_integrity()

    def _prefill(self, step: Step) -> list[SampledToken]:
        grid, coords = self._topology.grid, self._topology.coords
        lens = [len(s.prompt.token_ids) for s in step.sequences]
        split = split_prompts(lens, grid.pcp_size, dealt=deal_prompts(lens, grid.pcp_size, self._cost))
        plan = plan_prefill(
            split,
            [s.blocks for s in step.sequences],
            self._sharding,
            pcp_rank=coords.pcp_rank,
            shard=self._topology.kv_shard,
        )
        attention = PrefillStep(plan, self._backend, self._cache, self._topology.pcp)
        token_ids = [t for p in plan.pieces for t in step.sequences[p.prompt].prompt.token_ids[p.start : p.end]]
        mine = np.flatnonzero(plan.sample_rows >= 0)
        # A rank without tokens, or without a prompt's end, computes one dummy: models crash on zero rows.
        logits = self._runner.forward(
            self._tensor(token_ids or [0]),
            self._tensor(plan.positions if len(token_ids) else [0]),
            attention,
            self._tensor(plan.sample_rows[mine] if len(mine) else [0]),
        )
        owners = plan.sample_owner.tolist()
        places = [(owner, owners[:i].count(owner)) for i, owner in enumerate(owners)]
        return self._sample(logits[: len(mine)], [step.sequences[i] for i in mine], places)

    def _decode(self, step: Step) -> list[SampledToken]:
        grid, coords = self._topology.grid, self._topology.coords
        plan = plan_decode(
            [s.next_position for s in step.sequences],
            [s.blocks for s in step.sequences],
            self._sharding,
            pcp_size=grid.pcp_size,
            pcp_rank=coords.pcp_rank,
            shard=self._topology.kv_shard,
        )
        attention = DecodeStep(
            plan,
            self._backend,
            self._cache,
            self._topology.dcp,
            pcp_size=grid.pcp_size,
            wire_dtype=self._wire_dtype,
        )
        mine = [step.sequences[i] for i in plan.own if i >= 0]
        token_ids = [s.last_token_id for s in mine] + [0] * (len(plan.own) - len(mine))
        logits = self._runner.forward(
            self._tensor(token_ids),
            self._tensor(plan.positions),
            attention,
            self._tensor(np.arange(max(1, len(mine)))),
        )
        num_own = len(plan.own)
        places_of = {row: divmod(place, num_own) for place, row in enumerate(plan.gathered.tolist()) if row >= 0}
        places = [places_of[row] for row in range(len(step.sequences))]
        return self._sample(logits[: len(mine)], mine, places)

    def _sample(
        self, logits: Tensor, sequences: list[Sequence], places: ListLike[tuple[int, int]]
    ) -> list[SampledToken]:
        """Sample this rank's rows where it is the authority for them, and learn all others' tokens."""
        own: ListLike[SampledToken | None] = []
        if not bool(torch.isfinite(logits).all()):
            own = [None] * len(sequences)
        elif self._topology.coords.tp_rank == 0:
            own = sample_tokens(logits, sequences)
        return agree_on_tokens(self._topology.replica, self._topology.grid.tp_size, places, own, self._runner.device)

    def _result(self, sequence: Sequence) -> RolloutResult:
        assert sequence.finish_reason and sequence.first_token_s and sequence.finished_s
        later_tokens = len(sequence.sampled) - 1
        decode_s = sequence.finished_s - sequence.first_token_s
        return RolloutResult(
            id=sequence.prompt.id,
            prompt_index=sequence.prompt.index,
            sample_index=sequence.sample_index,
            prompt_token_ids=sequence.prompt.token_ids,
            token_ids=tuple(sequence.token_ids),
            text=self._stopping.text(sequence),
            logprobs=tuple(s.logprob for s in sequence.sampled),
            processed_logprobs=tuple(s.processed_logprob for s in sequence.sampled),
            finish_reason=sequence.finish_reason,
            ttft_s=sequence.first_token_s - sequence.submitted_s,
            tpot_s=decode_s / later_tokens if later_tokens else None,
            weights_version=WEIGHTS_VERSION,
        )

    def _agree_on_pool(self) -> PoolSize:
        """The KV pool that every rank can afford: memory may differ between them, block ids may not."""
        device = self._runner.device
        dtype = str(self._runner.dtype).removeprefix("torch.")
        pool = affordable_pool(self._runner.spec, self._config, dtype, device)
        return PoolSize(smallest(self._topology.replica, pool.num_blocks, device), pool.sharding)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self._runner.device)


def affordable_pool(spec: ModelSpec, config: Config, dtype: str, device: torch.device) -> PoolSize:
    """The KV pool that this rank's budget buys. UserError when that is not a single block."""
    per_token = spec.kv_layout(config.tp_size).bytes_per_token(spec.num_layers, dtype)
    budget = _kv_budget_bytes(config, device)
    pool = PoolSize.from_bytes(budget, per_token, KVSharding(config.dcp_size, config.interleave, config.block_size))
    if pool.num_blocks == 0:
        needed = per_token * config.block_size
        raise UserError(f"the KV budget of {budget} bytes buys no block of {needed} bytes. Raise kv_cache_gib.")
    return pool


def _kv_budget_bytes(config: Config, device: torch.device) -> int:
    """Bytes of KV pool on this rank: the config's, else a share of free memory on CUDA and a small pool on CPU."""
    if config.kv_cache_gib is None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_KV_CACHE_SHARE)
    return int((config.kv_cache_gib or CPU_KV_CACHE_GIB) * 2**30)
