"""Who runs in the next step. Pure Python and replicated: every rank holds one and all decide alike.

For that to hold, nothing that differs between ranks may enter a decision: no clock, no local memory reading, no set
order, no randomised hash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cpinfer.engine.request import FinishReason, SampledToken, Sequence
from cpinfer.layout.pool import BlockPool
from cpinfer.layout.shards import KVSharding


@dataclass(frozen=True)
class Step:
    """One step of the model: either whole prompts (`is_prefill`), or one token of every running sequence."""

    is_prefill: bool
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Continuous batching over a pool of KV blocks, first come first served.

    A sequence is admitted when the pool has the blocks of its longest possible end, so a running sequence never runs
    out. Prompts go before decode steps: a batch fills up before it advances.
    """

    def __init__(
        self, pool: BlockPool, sharding: KVSharding, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._pool = pool
        self._sharding = sharding
        # A decode step computes one token per sequence, so the token budget bounds the sequences too.
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. ValueError, with the numbers, when it could never run."""
        needed = self._blocks_of(sequence)
        if needed > self._pool.num_blocks:
            raise ValueError(
                f"prompt {sequence.prompt.id!r}: {len(sequence.prompt.token_ids)} tokens and {sequence.max_new_tokens} "
                f"new ones need {needed} KV blocks, the pool has {self._pool.num_blocks}"
            )
        if len(sequence.prompt.token_ids) > self._max_num_batched_tokens:
            raise ValueError(
                f"prompt {sequence.prompt.id!r}: {len(sequence.prompt.token_ids)} tokens exceed the "
                f"{self._max_num_batched_tokens} tokens of a step"
            )
        self._waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next step, None when all is done. Blocks of admitted sequences are taken from the pool here."""
        admitted: list[Sequence] = []
        num_tokens = 0
        while self._waiting and len(self._running) + len(admitted) < self._max_num_seqs:
            sequence = self._waiting[0]
            num_tokens += len(sequence.prompt.token_ids)
            needed = self._blocks_of(sequence)
            if needed > self._pool.num_free or num_tokens > self._max_num_batched_tokens:
                break
            sequence.blocks = self._pool.allocate(needed)
            admitted.append(self._waiting.popleft())
        if admitted:
            self._running += admitted
            return Step(True, tuple(admitted))
        return Step(False, tuple(self._running)) if self._running else None

    def commit(self, step: Step, sampled: Iterable[SampledToken], stops: Callable[[Sequence], bool]) -> list[Sequence]:
        """Append each sequence's new token; returns the sequences that this finished, their blocks freed."""
        finished = []
        for sequence, token in zip(step.sequences, sampled, strict=True):
            sequence.sampled.append(token)
            reason: FinishReason | None = "length" if len(sequence.sampled) >= sequence.max_new_tokens else None
            if stops(sequence):
                reason = "stop"
            if reason is not None:
                sequence.finish_reason = reason
                self._pool.free(sequence.blocks)
                sequence.blocks = []
                finished.append(sequence)
        if finished:
            self._running = [s for s in self._running if s.finish_reason is None]
        return finished

    def abort_all(self) -> None:
        """Forget every unfinished sequence and free its blocks."""
        for sequence in self._running:
            self._pool.free(sequence.blocks)
            sequence.blocks = []
        self._running, self._waiting = [], deque()

    def _blocks_of(self, sequence: Sequence) -> int:
        return self._sharding.num_blocks(sequence.max_cached_tokens)
