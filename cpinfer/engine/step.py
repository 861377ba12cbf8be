"""What one step of the model computes: chunks of prefills, or one token of every running request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cpinfer.engine.request import Request, SampledRequest, ScoredRequest
from cpinfer.kv_cache.prefix_cache import Key


@dataclass(eq=False)
class Prefill:
    """Tokens being computed for all `requests` that continue them: n samples of a prompt, or one request alone.

    In each home with requests one of them is the leader, which owns the blocks until the others fork off.
    `num_computed_tokens` tokens have KV in the home of every leader. `prefix_keys` are those of all its whole units.
    """

    token_ids: tuple[int, ...]
    requests: tuple[Request, ...]
    leaders: dict[int, Request]
    num_computed_tokens: int
    prefix_keys: Sequence[Key]

    @property
    def samples(self) -> tuple[SampledRequest, ...]:
        """Those that get a token when all is computed, and then run."""
        return tuple(r for r in self.requests if isinstance(r, SampledRequest))

    @property
    def scored(self) -> tuple[ScoredRequest, ...]:
        """Those that end when all is computed: one, or none."""
        return tuple(r for r in self.requests if isinstance(r, ScoredRequest))


@dataclass(frozen=True)
class Chunk:
    """Tokens `[start, end)` of a prefill, computed in one step. The last chunk of a prefill samples, if it is to."""

    prefill: Prefill
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.prefill.token_ids)

    @property
    def samples(self) -> tuple[SampledRequest, ...]:
        """The requests that get a token by this chunk."""
        return self.prefill.samples if self.is_last else ()

    @property
    def wants_experts(self) -> bool:
        """Whether its samples, which share a prefill, ask which experts its tokens went through."""
        return any(r.experts is not None for r in self.prefill.samples)

    @property
    def scored_positions(self) -> range:
        """Places in the sequence whose logits score a given token: of the prompt, or of an answer. The same for all."""
        return self.prefill.requests[0].scored_positions(self.start, self.end)


@dataclass(frozen=True)
class Step:
    """One step of the model: either chunks of prefills, or one token of every running request."""

    chunks: tuple[Chunk, ...]
    running: tuple[SampledRequest, ...]

    @property
    def samples(self) -> tuple[SampledRequest, ...]:
        """The requests that get a token, in the order in which `commit` wants them."""
        return tuple(s for chunk in self.chunks for s in chunk.samples) if self.chunks else self.running

    @property
    def told_of_experts(self) -> Iterator[tuple[Sequence[SampledRequest], int, int]]:
        """Requests that ask for experts, and the tokens `[start, end)` of each that the step runs, in its order."""
        for chunk in self.chunks:
            if chunk.wants_experts:
                yield chunk.prefill.samples, chunk.start, chunk.end
        for request in self.running:
            if request.experts is not None:
                yield (request,), request.next_position, request.next_position + 1


@dataclass
class StepDraft:
    """The chunks of a step so far, and how much more of it there may be."""

    num_tokens: int
    num_scored_positions: int
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.num_tokens -= chunk.end - chunk.start
        self.num_scored_positions -= len(chunk.scored_positions)
        self.chunks.append(chunk)
