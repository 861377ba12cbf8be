"""What one step of the model computes: chunks of prefills, or one token of every running request."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpinfer.engine.request import Request


@dataclass(eq=False)
class Prefill:
    """Tokens being computed for all `samples` that continue them: n samples of a prompt, or one that was preempted.

    In each home with samples one of them is the leader, which owns the blocks until the others fork off. `num_done`
    tokens have KV in the home of every leader. A given answer is computed with its prompt, by a single sample.
    """

    token_ids: tuple[int, ...]
    samples: tuple[Request, ...]
    leaders: dict[int, Request]
    num_done: int

    @property
    def scored(self) -> Request | None:
        """The request whose given answer this computes, if it is one."""
        return self.samples[0] if self.samples[0].targets else None

    @property
    def first_scored(self) -> int:
        """The place from which on tokens predict those of the answer: the last token of the prompt."""
        return len(self.samples[0].prompt.token_ids) - 1


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
    def samples(self) -> tuple[Request, ...]:
        """The requests that get a token by this chunk."""
        return self.prefill.samples if self.is_last and self.prefill.scored is None else ()

    @property
    def scored_places(self) -> range:
        """Places in the sequence whose logits score a token of a given answer."""
        if self.prefill.scored is None:
            return range(0)
        return range(max(self.start, self.prefill.first_scored), self.end)


@dataclass(frozen=True)
class Step:
    """One step of the model: either chunks of prefills, or one token of every running request."""

    chunks: tuple[Chunk, ...]
    running: tuple[Request, ...]

    @property
    def samples(self) -> tuple[Request, ...]:
        """The requests that get a token, in the order in which `commit` wants them."""
        return tuple(s for chunk in self.chunks for s in chunk.samples) if self.chunks else self.running


@dataclass
class StepDraft:
    """The chunks of a step so far, and how much more of it there may be."""

    num_tokens: int
    num_scored_places: int
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.num_tokens -= chunk.end - chunk.start
        self.num_scored_places -= len(chunk.scored_places)
        self.chunks.append(chunk)
