"""The engine: a model attached to a topology, a KV pool, and the loop that runs steps until all samples are done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator
from collections.abc import Sequence as ListLike
from contextlib import closing
from typing import Any

import torch

from cpinfer.backends.base import AttentionNeeds, make_backend
from cpinfer.cache.paged_kv_cache import PagedKVCache
from cpinfer.comm.topology import Topology
from cpinfer.config import Config, SamplingParams
from cpinfer.engine.agreement import gather_token_lists, smallest
from cpinfer.engine.kv_home import KVHome
from cpinfer.engine.pooled_prompts import PooledPrompts
from cpinfer.engine.prompts import PromptLike, as_prompt, check_prompt, check_scored_length, check_tokens
from cpinfer.engine.request import Prompt, RolloutResult, ScoreResult, Sequence
from cpinfer.engine.scheduler import Scheduler, SchedulerStats, sum_stats
from cpinfer.engine.step_runner import StepRunner
from cpinfer.engine.stopping import Stopping
from cpinfer.errors import EngineFaultError, UserError
from cpinfer.layout.capacity import KVLayout, PoolSize
from cpinfer.layout.heads import GroupHeads
from cpinfer.layout.shards import KVSharding
from cpinfer.models.runner import ModelRunner
from cpinfer.models.spec import ModelSpec

CPU_KV_CACHE_GIB = 0.25
CUDA_KV_CACHE_SHARE = 0.5


class Engine:
    """Generates with an attached model. Every rank of a dp replica holds one and makes the same calls on it.

    Made by `cpinfer.attach`, awake, and valid inside its block. `kv_capacity_tokens` is how long one sequence could be;
    `stats` count what the scheduler did in the last `generate` or `stream`.
    """

    def __init__(self, runner: ModelRunner, topology: Topology, config: Config, tokenizer: Any | None) -> None:
        self._runner = runner
        self._topology = topology
        self._config = config
        self._tokenizer = tokenizer
        self._stopping = Stopping(runner.spec.eos_token_ids, tokenizer)
        heads = runner.spec.heads(topology.grid.tp_size).in_group(topology.grid, topology.coords.tp_rank)
        self._cache_dtype = config.cache_dtype(str(runner.dtype).removeprefix("torch."))
        self._needs = attention_needs(runner.spec, heads, runner.dtype, getattr(torch, self._cache_dtype))
        self._kv_layout = runner.spec.kv_layout(len(heads.kv_heads))
        self._pool_size = self._agree_on_pool()
        self._homes = [
            KVHome(
                self._pool_size.num_blocks,
                self._pool_size.sharding,
                enable_prefix_caching=config.enable_prefix_caching,
            )
            for _ in range(topology.grid.num_homes)
        ]
        self._steps: StepRunner | None = None
        self._is_streaming = False
        self.weights_version = 0
        self.stats = SchedulerStats()
        self.wake()

    @property
    def kv_capacity_tokens(self) -> int:
        return self._pool_size.capacity_tokens

    @property
    def max_positions(self) -> int:
        """How many tokens the model can see at once, prompt and answer together."""
        return self._runner.spec.max_positions

    @property
    def is_awake(self) -> bool:
        return self._steps is not None

    @property
    def kv_pool_bytes(self) -> int:
        """What the KV pool takes on this rank while the engine is awake."""
        per_token = self._kv_layout.bytes_per_token(self._runner.spec.num_layers, self._cache_dtype)
        return self._pool_size.num_blocks * self._pool_size.sharding.block_size * per_token

    def wake(self) -> None:
        """Allocate the KV pool, and what attention kernels work in. Nothing happens when it is there."""
        if self._steps is not None:
            return
        runner, sharding = self._runner, self._pool_size.sharding
        cache = PagedKVCache(
            self._kv_layout,
            runner.spec.num_layers,
            self._pool_size.num_blocks,
            sharding.block_size,
            runner.dtype,
            runner.device,
            has_spare_block=self._config.cuda_graphs,
            store_dtype=self._needs.cache_dtype,
        )
        backend = make_backend(self._config.backend, runner.device, self._needs)
        self._steps = StepRunner(runner, self._topology, self._config, sharding, backend, cache, self._stopping)

    def sleep(self) -> None:
        """Free the KV pool and all scratch, for the optimiser to use; remembered prefixes are gone with it."""
        self._refuse_while_streaming("sleep")
        self._steps = None
        self._forget_prefixes()

    def weights_changed(self) -> None:
        """Tell the engine that the weights are new: `weights_version` rises, remembered prefixes are dropped."""
        self._refuse_while_streaming("change weights")
        self.weights_version += 1
        if self._steps is not None:
            self._steps.weights_changed()
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        for home in self._homes:
            home.prefixes.clear()

    def _notice_adapters(self) -> None:
        """Adapters that were switched, merged or scaled since the last call have made the weights new."""
        if self._runner.notice_adapters():
            self.weights_changed()

    def generate(
        self, prompts: Iterable[PromptLike], sampling: SamplingParams | ListLike[SamplingParams] | None = None
    ) -> list[RolloutResult]:
        """All samples of all prompts, in order of prompt and sample. An empty list of prompts gives an empty list."""
        results = list(self.stream(prompts, sampling))
        return sorted(results, key=lambda r: (r.prompt_index, r.sample_index))

    def generate_pooled(
        self,
        own_prompts: ListLike[ListLike[int]],
        sampling: SamplingParams | None = None,
        *,
        name: str = "",
        num_copies: int = 1,
    ) -> list[RolloutResult]:
        """One sample for each of *this rank's* prompts, in their order; a prompt that stands n times gets n samples.

        The prompts of all ranks of the replica become one batch, in which each distinct prompt is prefilled once, and
        every rank takes part in all of it; each then keeps its own. Ranks may bring different numbers of prompts, none
        included. `num_copies` consecutive ranks that train on the same data (tensor parallelism) bring the same prompts
        and get the same samples. `name` sets this batch apart from others of the same seed: batches of one name, layout
        and seed draw the same random numbers. UserError as `stream` has it. Collective over the replica.
        """
        sampling = sampling or self._config.sampling
        replica = self._topology.replica
        asked = gather_token_lists(replica, own_prompts, self._runner.device)
        pooled = PooledPrompts.of(asked[::num_copies])
        dp_rank = self._topology.coords.dp_rank
        prompts = [Prompt(i, f"{name}/{dp_rank}/{i}", tokens) for i, tokens in enumerate(pooled.prompts)]
        each = [dataclasses.replace(sampling, n=count) for count in pooled.counts]
        results = {(r.prompt_index, r.sample_index): r for r in self.stream(prompts, each)}
        return [results[place] for place in pooled.places[replica.index // num_copies]]

    def stream(
        self,
        prompts: Iterable[PromptLike],
        sampling: SamplingParams | ListLike[SamplingParams] | None = None,
        skip: frozenset[tuple[int, int]] = frozenset(),
    ) -> Iterator[RolloutResult]:
        """Samples as they finish, on every rank alike.

        A prompt is text, a list of token ids, a `Prompt`, or an object with the keys of an input line. `sampling` is
        for all prompts, or one for each; it defaults to the config's. `skip` holds (prompt_index, sample_index) that
        are not wanted. UserError, before anything runs, for a prompt that can never run; RuntimeError when the engine
        sleeps, or still has another stream open.
        """
        if self._steps is None:
            raise RuntimeError("the engine sleeps; call wake() before generating")
        self._refuse_while_streaming("start another stream")
        self._notice_adapters()
        scheduler = self._submit(list(prompts), sampling or self._config.sampling, skip)
        with closing(self._run(scheduler)) as finished:
            for sequence in finished:
                yield self._result(sequence)

    def score(self, pairs: Iterable[tuple[PromptLike, ListLike[int]]]) -> list[ScoreResult]:
        """How likely the model finds each (prompt, continuation), in their order; continuations are token ids.

        Prompts that several continuations share are computed once, as far as the pool can keep them. At most
        `MAX_SCORED_PLACES` rows of logits exist at a time. UserError, before anything runs, for a pair that can never
        run or a continuation without tokens; RuntimeError as `stream` has it.
        """
        if self._steps is None:
            raise RuntimeError("the engine sleeps; call wake() before scoring")
        self._refuse_while_streaming("score")
        self._notice_adapters()
        sequences = [self._to_score(index, *pair) for index, pair in enumerate(pairs)]
        # The first of those that share a prompt goes ahead, so that the others find it.
        seen: set[tuple[int, ...]] = set()
        first: list[Sequence] = []
        later: list[Sequence] = []
        for sequence in sequences:
            (later if sequence.prompt.token_ids in seen else first).append(sequence)
            seen.add(sequence.prompt.token_ids)
        stats = []
        for wave in (first, later):
            scheduler = self._scheduler()
            for sequence in wave:
                scheduler.add(sequence)
            for _ in self._run(scheduler):  # what it yields, it has written into the sequences
                pass
            stats.append(scheduler.stats)
        self.stats = sum_stats(stats)
        return [
            ScoreResult(tuple(s.logprob for s in sequence.scores), all(s.is_greedy for s in sequence.scores))
            for sequence in sequences
        ]

    def _to_score(self, index: int, given: PromptLike, continuation: ListLike[int]) -> Sequence:
        prompt = as_prompt(given, index, self._tokenizer)
        targets = tuple(continuation)
        if not targets:
            raise UserError(f"pair {index}: the continuation is empty; at least one token was wanted.")
        params = SamplingParams(max_new_tokens=len(targets))
        check_tokens(prompt.token_ids, self._runner.spec)
        check_tokens(targets, self._runner.spec)
        check_scored_length(len(prompt.token_ids), len(targets), self._runner.spec, self._pool_size)
        return Sequence(prompt, 0, params, len(targets), targets=targets)

    def _run(self, scheduler: Scheduler) -> Generator[Sequence, None, None]:
        """Steps until all is done; sequences as they finish."""
        assert self._steps is not None
        self.stats = scheduler.stats
        self._is_streaming = True
        self._steps.begin()
        try:
            while (step := scheduler.schedule()) is not None:
                output = self._steps.run(step)
                now = time.perf_counter()
                finished = scheduler.commit(step, output.sampled, self._stopping.stops, output.scores)
                self._steps.copy_blocks(scheduler.take_copies(self._topology.grid.home(self._topology.rank)))
                for sequence in step.samples:
                    if sequence.sampled:  # one that was put back has no token yet
                        sequence.first_token_s = sequence.first_token_s or now
                for sequence in finished:
                    sequence.finished_s = now
                    yield sequence
        except EngineFaultError:
            # What is not finite may lie in remembered prefixes; nothing else that is stored will be read again.
            self._steps.clear_cache()
            self._forget_prefixes()
            raise
        finally:
            self._is_streaming = False
            scheduler.abort_all()
            scheduler.check_integrity()

    def _submit(
        self,
        prompts: ListLike[PromptLike],
        sampling: SamplingParams | ListLike[SamplingParams],
        skip: frozenset[tuple[int, int]],
    ) -> Scheduler:
        """A scheduler with a sequence for every wanted sample."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} sampling parameters for {len(prompts)} prompts; one each was wanted.")
        scheduler = self._scheduler()
        for index, (given, params) in enumerate(zip(prompts, each, strict=True)):
            if params.stop and self._tokenizer is None:
                raise UserError("stop strings need a tokenizer: give one to attach, or use stop_token_ids.")
            prompt = as_prompt(given, index, self._tokenizer)
            check_prompt(prompt, params, self._runner.spec, self._pool_size)
            room = self._runner.spec.max_positions - len(prompt.token_ids)
            for sample_index in range(params.n):
                if (prompt.index, sample_index) not in skip:
                    scheduler.add(Sequence(prompt, sample_index, params, min(params.max_new_tokens, room)))
        return scheduler

    def _scheduler(self) -> Scheduler:
        return Scheduler(
            self._homes,
            self._pool_size.sharding,
            self._config.max_num_seqs,
            self._config.max_num_batched_tokens,
            window=self._runner.spec.widest_window,
        )

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
            weights_version=self.weights_version,
            top_logprobs=tuple(s.top for s in sequence.sampled) if sequence.params.top_logprobs else None,
        )

    def _agree_on_pool(self) -> PoolSize:
        """The KV pool that every rank can afford: memory, or the heads it stores, may differ, block ids may not."""
        runner = self._runner
        pool = affordable_pool(runner.spec, self._kv_layout.num_heads, self._config, self._cache_dtype, runner.device)
        return PoolSize(smallest(self._topology.replica, pool.num_blocks, runner.device), pool.sharding)

    def _refuse_while_streaming(self, what: str) -> None:
        if self._is_streaming:
            raise RuntimeError(f"cannot {what} while a stream is open; finish or close it first")


def attention_needs(
    spec: ModelSpec, heads: GroupHeads, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> AttentionNeeds:
    """What a rank with these heads asks of its attention backend."""
    own_heads, has_windows = heads.num_q_heads, any(w is not None for w in spec.windows)
    own_kv_heads = heads.own.stop - heads.own.start
    calls = {(own_heads, spec.kv_layout(own_kv_heads))}
    if len(set(heads.q_per_kv)) == 1:
        calls.add((sum(heads.q_per_kv), spec.kv_layout(len(heads.kv_heads))))
    else:  # one call per KV head
        calls |= {(num_q_heads, spec.kv_layout(1)) for num_q_heads in heads.q_per_kv}
    if spec.latent is not None:
        calls.add((own_heads, KVLayout(own_heads, spec.head_dim, spec.latent.v_head_dim)))
    ordered = sorted(calls, key=lambda call: (call[0], call[1].num_heads))
    return AttentionNeeds(dtype, tuple(ordered), has_windows, cache_dtype)


def affordable_pool(
    spec: ModelSpec, num_heads: int, config: Config, cache_dtype: str, device: torch.device
) -> PoolSize:
    """The KV pool that a rank's budget buys, of `num_heads` stored KV heads. UserError when it is no single block."""
    per_token = spec.kv_layout(num_heads).bytes_per_token(spec.num_layers, cache_dtype)
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
