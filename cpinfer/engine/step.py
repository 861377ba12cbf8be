"""What one step of the model computes: chunks of prefills, or one token of every running request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cpinfer.engine.request import Request, SampledRequest, ScoredRequest
from cpinfer.kv_cache.prefix_cache import Key
from cpinfer.layout.states import StatePlace


@dataclass(eq=False)
class Prefill:
    """Tokens being computed for all `requests` that continue them: n samples of a prompt, or one request alone.

    In each home with requests one of them is the leader, which owns the blocks until the others fork off.
    `num_computed_tokens` tokens have KV in the home of every leader. `prefix_keys` are those of all its whole units.

    Where sequences have states: `state_start` is where that behind the tokens found cached lies, until a chunk has gone
    on from it, and `state_ends` are the numbers of tokens behind which one is to be kept, ascending, with their keys.
    """

    token_ids: tuple[int, ...]
    requests: tuple[Request, ...]
    leaders: dict[int, Request]
    num_computed_tokens: int
    prefix_keys: Sequence[Key]
    state_start: StatePlace | None = None
    state_ends: Mapping[int, Key] = field(default_factory=dict)

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
    """Tokens `[start, end)` of a prefill, computed in one step. The last chunk of a prefill samples, if it is to.

    `state_place`: where the state behind it is kept for others, if it is.
    """

    prefill: Prefill
    start: int
    end: int
    state_place: StatePlace | None = None

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
    """The chunks of a step so far, and how much more of it there may be; `unit` as `KVSharding.prefix_unit` has it."""

    num_tokens: int
    num_scored_positions: int
    unit: int
    chunks: list[Chunk] = field(default_factory=list)

    def next_of(self, prefill: Prefill) -> Chunk | None:
        """The next chunk of a prefill, as far as the step has room for it."""
        start, length = prefill.num_computed_tokens, len(prefill.token_ids)
        end = next((end for end in prefill.state_ends if end > start), length)
        if end > start + self.num_tokens:
            end = start + self.num_tokens
            # On a multiple of the unit every shard holds whole blocks, and all of them equally many.
            aligned = end // self.unit * self.unit
            end = aligned if aligned > start else end
        # Logits are as wide as the vocabulary, so few tokens may have theirs at once.
        end -= max(0, len(Chunk(prefill, start, end).scored_positions) - self.num_scored_positions)
        return Chunk(prefill, start, end) if end > start else None

    def add(self, chunk: Chunk) -> None:
        self.num_tokens -= chunk.end - chunk.start
        self.num_scored_positions -= len(chunk.scored_positions)
        self.chunks.append(chunk)
