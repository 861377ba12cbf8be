"""The engine: a model attached to a topology, a KV pool, and the loop that runs steps until all samples are done."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as ListLike
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cpinfer.attention.backends.base import make_backend
from cpinfer.comm.topology import Topology
from cpinfer.config import Config, SamplingParams
from cpinfer.engine.agreement import Prepared, begin_together, gather_packed, pack_token_lists
from cpinfer.engine.needs import attention_needs
from cpinfer.engine.pooled_prompts import PooledPrompts
from cpinfer.engine.prompts import (
    PromptLike,
    PromptsLike,
    as_pairs,
    as_prompt,
    as_prompts,
    as_sampling,
    as_token_lists,
    check_distinct,
    check_prompt,
    check_scored_length,
    check_tokens,
    longest_prompt,
    naming,
)
from cpinfer.engine.request import Prompt, RolloutResult, ScoreResult, Sequence
from cpinfer.engine.scheduler import Scheduler, SchedulerStats, Step, sum_stats
from cpinfer.engine.step_runner import StepRunner
from cpinfer.engine.stopping import Stopping
from cpinfer.errors import EngineFaultError, RanksDifferError, StreamEndedError, UserError
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.capacity import PoolSize
from cpinfer.models.runner import ModelRunner

T = TypeVar("T")


class Engine:
    """Generates with an attached model. Every rank of a dp replica holds one and makes the same calls on it.

    Made by `cpinfer.attach`, awake, and valid inside its block. `kv_capacity_tokens` is how long one sequence could be;
    `stats` count what the scheduler did in the last `generate` or `stream`.
    """

    def __init__(
        self, runner: ModelRunner, topology: Topology, config: Config, tokenizer: Any | None, pool_size: PoolSize
    ) -> None:
        self._runner = runner
        self._topology = topology
        self._config = config
        self._tokenizer = tokenizer
        self._stopping = Stopping(runner.spec.eos_token_ids, tokenizer)
        heads = runner.spec.heads(topology.grid.tp_size).in_group(topology.grid, topology.coords.tp_rank)
        self._cache_dtype = config.cache_dtype(str(runner.dtype).removeprefix("torch."))
        self._needs = attention_needs(runner.spec, heads, runner.dtype, getattr(torch, self._cache_dtype))
        self._kv_layout = runner.spec.kv_layout(len(heads.kv_heads))
        self._pool_size = pool_size
        self._homes = self._empty_homes()
        self._steps: StepRunner | None = None
        self._open: Generator[Sequence, None, None] | None = None
        self._is_closed = False
        # Whether the last run stopped anywhere: what the homes have written down of their blocks may then be wrong.
        self._is_cut = False
        # What ended a stream here, where that could only be told to the others.
        self._left_alone: StreamEndedError | None = None
        self.weights_version = 0
        self.stats = SchedulerStats()

    @property
    def kv_capacity_tokens(self) -> int:
        return self._pool_size.capacity_tokens

    @property
    def max_positions(self) -> int:
        """How many tokens the model can see at once, prompt and answer together."""
        return self._runner.spec.max_positions

    def longest_prompt(self, sampling: SamplingParams) -> int:
        """Tokens of the longest prompt that leaves room for a whole answer; below 1 when none does."""
        return longest_prompt(sampling, self._runner.spec, self._pool_size)

    @property
    def is_awake(self) -> bool:
        return self._steps is not None

    @property
    def kv_pool_bytes(self) -> int:
        """What the KV pool takes on this rank while the engine is awake."""
        per_token = self._kv_layout.bytes_per_token(self._runner.spec.num_layers, self._cache_dtype)
        return self._pool_size.num_blocks * self._pool_size.sharding.block_size * per_token

    def wake(self) -> None:
        """Allocate the KV pool, and what attention kernels work in. Nothing happens when it is there.

        A rank that cannot is an error on all of them. Collective over the replica: one small gather.
        """
        self._refuse_when_closed()
        self._steps = self._together(lambda: Prepared(self._steps or self._made_steps(), lambda: {"call": "wake"}))

    def sleep(self) -> None:
        """Free the KV pool and all scratch, for the optimiser to use; remembered prefixes are gone with it."""
        self._refuse_while_streaming("sleep")
        self._forget_prefixes()
        self._steps = None

    def weights_changed(self) -> None:
        """Tell the engine that the weights are new: `weights_version` rises, remembered prefixes are dropped."""
        self._refuse_when_closed()
        self._refuse_while_streaming("change weights")
        self._forget_prefixes()
        self.weights_version += 1
        if self._steps is not None:
            self._steps.weights_changed()

    def close(self) -> None:
        """End an open stream, free the KV pool, refuse what is asked later. `attach` calls it when its block ends."""
        if self._open is not None:
            self._open.close()
        self._is_closed = True
        self._steps = None

    def raise_if_left_alone(self) -> None:
        """StreamEndedError when this rank left a stream that others went on with: they have it, and so it does here."""
        error, self._left_alone = self._left_alone, None
        if error is not None:
            raise error

    def generate(
        self, prompts: PromptsLike, sampling: SamplingParams | ListLike[SamplingParams] | None = None
    ) -> list[RolloutResult]:
        """All samples of all prompts, in order of prompt and sample. An empty list of prompts gives an empty list."""
        results = list(self.stream(prompts, sampling))
        return sorted(results, key=lambda r: (r.prompt_index, r.sample_index))

    def generate_pooled(
        self,
        own_prompts: PromptsLike,
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
        and seed draw the same random numbers. Without one a batch draws numbers of its own; the ids of its results tell
        the name by which it can be repeated. Errors as `stream` has them: a prompt that one rank cannot run is an error
        on all. Collective over the replica.
        """
        self._refuse_when_closed()
        self._refuse_while_streaming("start another batch")
        params = sampling or self._config.sampling
        topology, device = self._topology, self._runner.device
        packed, lens = begin_together(
            topology, device, lambda: self._packed_prompts(own_prompts, params, name, num_copies)
        )
        told = gather_packed(topology.replica, packed, lens, device)
        asked = [lists for _, *lists in told]
        for first in range(0, len(asked), num_copies):
            if any(copy != asked[first] for copy in asked[first : first + num_copies]):
                raise RanksDifferError(
                    f"places {first} to {first + num_copies - 1} of the replica train on the same data (num_copies="
                    f"{num_copies}), so they should bring the same prompts; they bring others."
                )
        pooled = PooledPrompts.of(asked[::num_copies])
        name = name or f"unnamed-{told[0][0][0]:x}"
        prompts = [
            Prompt(i, f"{name}/{topology.coords.dp_rank}/{i}", tokens) for i, tokens in enumerate(pooled.prompts)
        ]
        each = [dataclasses.replace(params, n=count) for count in pooled.counts]
        scheduler = self._scheduler_of(prompts, each, frozenset())
        results = {(r.prompt_index, r.sample_index): r for r in self._results(scheduler)}
        return [results[place] for place in pooled.places[topology.replica.index // num_copies]]

    def stream(
        self,
        prompts: PromptsLike,
        sampling: SamplingParams | ListLike[SamplingParams] | None = None,
        skip: frozenset[tuple[int, int]] = frozenset(),
    ) -> Iterator[RolloutResult]:
        """Samples as they finish, on every rank alike.

        A prompt is text, a list or an array of token ids, a chat (a list of messages), a `Prompt`, or an object with
        the keys of an input line; one stands for a list of one. `sampling` is for all prompts, or one for each; it
        defaults to the config's. `skip` holds (prompt_index, sample_index) that are not wanted. UserError, before
        anything runs, for a prompt that can never run; RuntimeError when the engine sleeps, or still has another stream
        open; RanksDifferError when ranks do not make the same call. Every rank takes all results, or leaves the loop at
        the same one: where some leave alone, all get StreamEndedError, they themselves at their next call or at the end
        of the engine's block. Collective over the replica: one small gather, beside the steps.
        """
        self._refuse_when_closed()
        self._refuse_while_streaming("start another stream")
        scheduler = self._together(lambda: self._submitted(prompts, sampling, skip))
        yield from self._results(scheduler)
        self._refuse_when_closed()  # else the end of the block would pass for that of the stream

    def score(self, pairs: Iterable[tuple[PromptLike, ListLike[int]]]) -> list[ScoreResult]:
        """How likely the model finds each (prompt, continuation), in their order; continuations are token ids.

        Prompts that several continuations share are computed once, as far as the pool can keep them. At most
        `MAX_SCORED_PLACES` rows of logits exist at a time. UserError, before anything runs, for a pair that can never
        run or a continuation without tokens; other errors as `stream` has them. Collective over the replica.
        """
        self._refuse_when_closed()
        self._refuse_while_streaming("score")
        sequences = self._together(lambda: self._to_score_together(pairs))
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

    def _forget_prefixes(self) -> None:
        # Nothing else is in the homes between calls. They go all at once, so an interrupt finds them there or gone.
        self._homes = self._empty_homes()

    def _together(self, prepare: Callable[[], Prepared[T]]) -> T:
        """What this rank prepares, when all ranks have prepared the same."""
        return begin_together(self._topology, self._runner.device, prepare)[0]

    def _check_ready(self) -> None:
        """What has to hold when a call begins; where it does not on one rank, `_together` tells the others."""
        if self._steps is None:
            raise RuntimeError("the engine sleeps; call wake() before generating or scoring")
        self._runner.check_unchanged()
        if self._runner.notice_adapters():  # switched, merged or scaled since the last call, they make other weights
            self.weights_changed()
        if self._is_cut:  # an error or an interrupt may have come between taking blocks and writing them down
            self._forget_prefixes()
            self._is_cut = False

    def _state(self) -> dict[str, object]:
        """What ranks must have in common when a call begins, beside what it is about."""
        free_blocks = [home.pool.num_free for home in self._homes]
        return {
            "weights_version": self.weights_version,
            "adapters": self._runner.adapters,
            "free KV blocks": free_blocks,
        }

    def _submitted(
        self,
        prompts: PromptsLike,
        sampling: SamplingParams | ListLike[SamplingParams] | None,
        skip: frozenset[tuple[int, int]],
    ) -> Prepared[Scheduler]:
        self._check_ready()
        given = as_prompts(prompts)
        each = as_sampling(sampling, len(given), self._config.sampling)
        self._refuse_unread_stops(each)
        wanted = []
        for index, (prompt, params) in enumerate(zip(given, each, strict=True)):
            with naming("prompt", index):
                wanted.append(as_prompt(prompt, index, self._tokenizer))
                check_prompt(wanted[-1], params, self._runner.spec, self._pool_size)
        check_distinct(wanted, [params.seed for params in each])
        scheduler = self._scheduler_of(wanted, each, skip)
        distinct = {params: i for i, params in enumerate(dict.fromkeys(each))}
        return Prepared(
            scheduler,
            lambda: {
                "call": "generate",
                **self._state(),
                "sampling": each[0] if len(distinct) == 1 else [list(distinct), [distinct[params] for params in each]],
                "skip": sorted(skip),
                "prompts": wanted,
            },
        )

    def _packed_prompts(
        self, own_prompts: PromptsLike, params: SamplingParams, name: str, num_copies: int
    ) -> Prepared[NDArray[np.int64]]:
        """This rank's prompts as one row of numbers, with a number of its own in front, by which to name the batch."""
        self._check_ready()
        if not isinstance(params, SamplingParams):
            raise UserError(f"found a {type(params).__name__} for sampling; SamplingParams were wanted.")
        self._refuse_unread_stops([params])
        num_ranks = self._topology.replica.size
        if type(num_copies) is not int or num_copies < 1 or num_ranks % num_copies:
            raise UserError(f"num_copies is {num_copies!r}; a divisor of the replica's {num_ranks} rank(s) was wanted.")
        own = as_token_lists(own_prompts, self._tokenizer)
        for i, tokens in enumerate(own):
            with naming("prompt", i):
                check_prompt(Prompt(i, str(i), tokens), params, self._runner.spec, self._pool_size)
        packed = pack_token_lists([[secrets.randbits(62)], *own])
        call = {"call": "generate_pooled", "sampling": params, "name": name, "num_copies": num_copies}
        return Prepared(packed, lambda: {**call, **self._state()}, number=len(packed))

    def _to_score_together(self, pairs: Iterable[tuple[PromptLike, ListLike[int]]]) -> Prepared[list[Sequence]]:
        self._check_ready()
        sequences = []
        for index, pair in enumerate(as_pairs(pairs)):
            with naming("pair", index):
                sequences.append(self._to_score(index, *pair))
        tokens = [(s.prompt.token_ids, s.targets) for s in sequences]
        return Prepared(sequences, lambda: {"call": "score", **self._state(), "pairs": tokens})

    def _to_score(self, index: int, given: PromptLike, continuation: ListLike[int]) -> Sequence:
        prompt = as_prompt(given, index, self._tokenizer)
        targets = tuple(continuation)
        if not targets:
            raise UserError("the continuation is empty; at least one token was wanted.")
        params = SamplingParams(max_new_tokens=len(targets))
        check_tokens(prompt.token_ids, self._runner.spec)
        check_tokens(targets, self._runner.spec)
        check_scored_length(len(prompt.token_ids), len(targets), self._runner.spec, self._pool_size)
        return Sequence(prompt, 0, params, len(targets), targets=targets)

    def _results(self, scheduler: Scheduler) -> Generator[RolloutResult, None, None]:
        self._open = finished = self._run(scheduler)
        version = self.weights_version
        try:
            for sequence in finished:
                yield self._result(sequence, version)
        finally:
            finished.close()
            if self._open is finished:
                self._open = None

    def _run(self, scheduler: Scheduler) -> Generator[Sequence, None, None]:
        """Steps until all is done; sequences as they finish.

        Those of the last step come when it has ended: a consumer that lingers over them keeps nobody waiting, and may
        make the next call before it has taken them all.
        """
        assert self._steps is not None
        self.stats = scheduler.stats
        self._is_cut = True  # until it has come to an end that all ranks know
        self._steps.begin()
        finished: list[Sequence] = []
        try:
            while (step := scheduler.schedule()) is not None:
                finished = self._advance(scheduler, step)
                if not scheduler.num_unfinished:
                    break
                try:
                    yield from finished
                except BaseException:  # whoever takes the results has left
                    self._leave(scheduler)
                    raise
        except EngineFaultError:
            # What is not finite may lie in remembered prefixes; nothing else that is stored will be read again.
            self._steps.clear_cache()
            self._forget_prefixes()
            raise
        self._end(scheduler)
        yield from finished

    def _advance(self, scheduler: Scheduler, step: Step, *, leaves: bool = False) -> list[Sequence]:
        """Run a step and take note of it; the sequences that it finished."""
        assert self._steps is not None
        output = self._steps.run(step, leaves=leaves)
        now = time.perf_counter()
        finished = scheduler.commit(step, output.sampled, self._stopping.stops, output.scores)
        self._steps.copy_blocks(scheduler.take_copies(self._topology.grid.home(self._topology.rank)))
        for sequence in step.samples:
            if sequence.sampled:  # one that was put back has no token yet
                sequence.first_token_s = sequence.first_token_s or now
        for sequence in finished:
            sequence.finished_s = now
        return finished

    def _leave(self, scheduler: Scheduler) -> None:
        """Tell the others, who may be in the next step already, that this rank takes no more results.

        So it takes part in steps up to the first that has a record to say it in. Where all leave, all is well.
        """
        try:
            while self._topology.replica.size > 1 and (step := scheduler.schedule()) is not None:
                self._advance(scheduler, step, leaves=True)
        except StreamEndedError as ended:
            if len(ended.places) < self._topology.replica.size:
                self._left_alone = ended
                return
        self._end(scheduler)

    def _end(self, scheduler: Scheduler) -> None:
        scheduler.abort_all()
        scheduler.check_integrity()
        if self._steps is not None:
            self._steps.tell_end(scheduler)
        self._is_cut = False
        self._open = None

    def _scheduler_of(
        self,
        prompts: ListLike[Prompt],
        sampling: ListLike[SamplingParams],
        skip: frozenset[tuple[int, int]],
    ) -> Scheduler:
        """A scheduler with a sequence for every wanted sample of prompts that can run."""
        scheduler = self._scheduler()
        for prompt, params in zip(prompts, sampling, strict=True):
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

    def _result(self, sequence: Sequence, weights_version: int) -> RolloutResult:
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
            weights_version=weights_version,
            top_logprobs=tuple(s.top for s in sequence.sampled) if sequence.params.top_logprobs else None,
        )

    def _made_steps(self) -> StepRunner:
        """The KV pool, the backend, and what runs steps with them."""
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
        return StepRunner(runner, self._topology, self._config, sharding, backend, cache, self._stopping)

    def _empty_homes(self) -> list[KVHome]:
        return [
            KVHome(
                self._pool_size.num_blocks,
                self._pool_size.sharding,
                enable_prefix_caching=self._config.enable_prefix_caching,
            )
            for _ in range(self._topology.grid.num_homes)
        ]

    def _refuse_unread_stops(self, sampling: ListLike[SamplingParams]) -> None:
        if self._tokenizer is None and any(params.stop for params in sampling):
            raise UserError("stop strings need a tokenizer: give one to attach, or use stop_token_ids.")

    def _refuse_when_closed(self) -> None:
        self.raise_if_left_alone()
        if self._is_closed:
            raise RuntimeError(
                "the block of this engine has ended, and its model is the job's again; attach it anew for more"
            )

    def _refuse_while_streaming(self, what: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"cannot {what} while a stream is open; finish or close it first")
