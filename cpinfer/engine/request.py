"""A request: one sample of one prompt while it runs, and its result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from cpinfer.config import SamplingParams

FinishReason = Literal["stop", "length"]

# Stands in a block table for a block that its request gave back.
DROPPED = -1


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids, at least one. `id` names it in results and in its randomness; `index` is its place."""

    index: int
    id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class SampledToken:
    """One token, with its logprob in the model's distribution and in the processed one it was drawn from.

    `top`: the likeliest tokens at its place and their raw logprobs, as many as its parameters ask for.
    """

    token_id: int
    logprob: float
    processed_logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenScore:
    """The model's logprob of a token that was given to it, and whether it finds no other likelier at that place."""

    logprob: float
    is_greedy: bool


@dataclass(eq=False)
class Request:
    """One sample of one prompt while it runs: what the scheduler knows of it.

    With `targets` its answer is given, and it is scored instead of sampled: `scores` are those of the targets.
    """

    prompt: Prompt
    sample_index: int
    params: SamplingParams
    max_new_tokens: int
    submitted_s: float = field(default_factory=time.perf_counter)
    home: int = 0
    blocks: list[int] = field(default_factory=list)
    # Blocks at the front that it gave back, because no layer sees their tokens any more; their numbers are gone.
    num_dropped: int = 0
    sampled: list[SampledToken] = field(default_factory=list)
    targets: tuple[int, ...] = ()
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def held_blocks(self) -> list[int]:
        """The blocks it refers to."""
        return self.blocks[self.num_dropped :]

    def drop_blocks(self, num_dead: int) -> list[int]:
        """Give up the first `num_dead` blocks; returns those that it still had."""
        dropped = self.blocks[self.num_dropped : num_dead]
        if dropped:
            self.blocks[self.num_dropped : num_dead] = [DROPPED] * len(dropped)
            self.num_dropped = num_dead
        return dropped

    def take_blocks(self) -> list[int]:
        """All blocks it still had; it is left with none."""
        held, self.blocks, self.num_dropped = self.held_blocks, [], 0
        return held

    @property
    def token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return [s.token_id for s in self.sampled]

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """Prompt and answer so far; of a given answer all but the last token, behind which nothing is asked."""
        return (*self.prompt.token_ids, *self.token_ids, *self.targets[:-1])

    @property
    def last_token_id(self) -> int:
        return self.sampled[-1].token_id

    @property
    def next_position(self) -> int:
        """Position of the newest token, which the next decode step computes: as many tokens as have KV."""
        return len(self.prompt.token_ids) + len(self.sampled) - 1

    @property
    def max_cached_tokens(self) -> int:
        """Tokens whose KV it may come to hold: the last token it generates is never computed."""
        return len(self.prompt.token_ids) + self.max_new_tokens - 1


@dataclass(frozen=True)
class ScoreResult:
    """How likely the model finds a given continuation, in its raw distribution (temperature 1, nothing processed).

    `logprobs`, one per token of the continuation; `is_greedy`, whether greedy decoding would have written all of it.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class RolloutResult:
    """One finished sample; its fields are the keys of an output line.

    `token_ids` includes the stop token that ended it. `logprobs` are the raw distribution's (temperature 1, nothing
    processed), `processed_logprobs` those of the distribution that was sampled from: 0 under greedy decoding, which
    leaves one token. `ttft_s` counts from submission; `tpot_s` is null for a single token. `text` is null without a
    tokenizer. `weights_version` counts the weight changes that the engine was told of. `top_logprobs`, for each token
    the likeliest tokens and their raw logprobs, is None (and no key of an output line) unless it was asked for.
    """

    id: str
    prompt_index: int
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    logprobs: tuple[float, ...]
    processed_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    ttft_s: float
    tpot_s: float | None
    weights_version: int
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
