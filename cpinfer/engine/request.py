"""Requests: a prompt whose answer is sampled, or given and scored; and their results."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from cpinfer.config import SamplingParams
from cpinfer.kv_cache.expert_record import ExpertRecord, Experts
from cpinfer.kv_cache.prefix_cache import Key
from cpinfer.kv_cache.state_pool import StateSlot

FinishReason = Literal["stop", "length", "abort"]

# Some of the keys of `SamplingParams`, by name.
OwnSampling = Mapping[str, Any] | tuple[tuple[str, Any], ...]

# Stands in a block table for a block that its request gave back.
DROPPED = -1


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids.

    Attributes:
        index: its place among the prompts of a call, from 0.
        id: names it in results and in its randomness; no two of a call are alike.
        token_ids: its tokens, at least one.
        sampling: keys of `SamplingParams` that it has of its own, and that win over those of a call.
    """

    index: int
    id: str
    token_ids: tuple[int, ...]
    sampling: OwnSampling | None = None

    @cached_property
    def random_key(self) -> int:
        """64 bits of its id, by which its samples draw."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=8).digest())


class SampledToken(NamedTuple):
    """One token of an answer.

    Attributes:
        token_id: which.
        logprob: natural log, in the model's own distribution (temperature 1, nothing processed).
        processed_logprob: the same in the distribution that it was drawn from; 0 under greedy decoding.
        top: the likeliest tokens at its place and their raw logprobs, as many as its parameters ask for.
        kept_mass: in (0, 1], the probability of all tokens that top_k, top_p and min_p kept, in the distribution that
            they cut: temperature, penalty, bias and suppression applied. `processed_logprob + log(kept_mass)` is the
            logprob there. 1 where nothing was cut, and under greedy decoding, which cuts no distribution: it has one
            token.
        kept_ids: those tokens, ascending; None unless its parameters ask for them, and where they are over 1024. Under
            greedy decoding the token itself.
    """

    token_id: int
    logprob: float
    processed_logprob: float
    top: tuple[tuple[int, float], ...] = ()
    kept_mass: float = 1.0
    kept_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenScore:
    """The model's logprob of a token that was given to it, and whether it finds no other likelier at that place.

    `top`: the likeliest tokens there and their logprobs, as many as are asked for.
    """

    logprob: float
    is_greedy: bool
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request(ABC):
    """What the scheduler has to know of anything that runs: its tokens, and the KV blocks that it holds.

    What becomes of its logits, its type says: a `SampledRequest` draws tokens from them, a `ScoredRequest` reads off
    how likely a given answer is. `scores` are of tokens that it was given, as far as they are known, `experts` of those
    that were run, where it asks. Of those that wait
    the lowest `priority` goes first. One that `continues` another begins with all tokens of it, and computes only what
    is new while the other's KV is kept.
    """

    prompt: Prompt
    _: KW_ONLY
    priority: int = 0
    continues: SampledRequest | None = None
    submitted_s: float = field(default_factory=time.perf_counter)
    home: int = 0
    blocks: list[int] = field(default_factory=list)
    # Where its state lies, of a model that has one of each sequence, from its admission on.
    state: StateSlot | None = None
    # Blocks at the front that it gave back, because no layer sees their tokens any more; their numbers are gone.
    num_dropped: int = 0
    # Of the whole units of its tokens, as far as they have been asked for: tokens are appended, never changed.
    prefix_keys: list[Key] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    experts: ExpertRecord | None = None
    finished_s: float | None = None
    _packed: array[int] = field(default_factory=lambda: array("i"), repr=False)
    _packed_of: list[int] | None = field(default=None, repr=False)

    @property
    @abstractmethod
    def all_token_ids(self) -> tuple[int, ...]:
        """What a prefill computes for it now."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many those are."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens it may come to have, prompt and answer together."""

    @property
    @abstractmethod
    def first_logits_place(self) -> int:
        """The first place of a prefill whose logits it reads: what is cached of others is of use up to there."""

    @abstractmethod
    def scored_positions(self, start: int, end: int) -> range:
        """Places in `[start, end)` of a prefill whose logits score a token that it was given."""

    @abstractmethod
    def target_at(self, place: int) -> int:
        """The token that the logits at a scored place are asked for."""

    @property
    def num_top(self) -> int:
        """How many of the likeliest tokens it wants to know at each place."""
        return 0

    def note_experts(self, start: int, experts: Experts) -> None:
        """Take note of the experts of tokens from `start` on, if it asks for them."""
        if self.experts is not None:
            self.experts.add(start, experts)

    @abstractmethod
    def shares_prefill_with(self, other: Request) -> bool:
        """Whether one prefill does for both."""

    def restart(self, version: int | None) -> None:
        """All of it is to be computed anew, by weights behind those of `version`, None: by the same.

        Scores that are not complete go.
        """
        self.scores.clear()

    @property
    def max_cached_tokens(self) -> int:
        """Tokens whose KV it may come to hold: the last token of an answer is never computed."""
        return self.max_length - 1

    @property
    def held_blocks(self) -> list[int]:
        """The blocks it refers to."""
        return self.blocks[self.num_dropped :]

    @property
    def last_block(self) -> int | None:
        """The last of them, None where it refers to none."""
        return self.blocks[-1] if len(self.blocks) > self.num_dropped else None

    def drop_blocks(self, num_dead: int) -> list[int]:
        """Give up the first `num_dead` blocks; returns those that it still had."""
        dropped = self.blocks[self.num_dropped : num_dead]
        if dropped:
            self.blocks[self.num_dropped : num_dead] = [DROPPED] * len(dropped)
            self.num_dropped = num_dead
            self._packed_of = None
        return dropped

    @property
    def packed_blocks(self) -> array[int]:
        """`blocks` as 32-bit numbers, which grow with them: steps join the tables of all that run, byte by byte."""
        if self._packed_of is not self.blocks or len(self._packed) > len(self.blocks):
            self._packed, self._packed_of = array("i", self.blocks), self.blocks
        elif len(self._packed) < len(self.blocks):
            self._packed.extend(self.blocks[len(self._packed) :])
        return self._packed

    def take_blocks(self) -> list[int]:
        """All blocks it still had; it is left with none."""
        held, self.blocks, self.num_dropped = self.held_blocks, [], 0
        return held

    def take_state(self) -> StateSlot | None:
        """The place of its state, if it had one; it is left with none."""
        held, self.state = self.state, None
        return held


@dataclass(eq=False)
class SampledRequest(Request):
    """One sample of one prompt: after its prefill it runs, and gets a token in every step until it ends.

    Where it `keeps_kv` its KV stays when it has ended, for one that continues it. `earlier_weights`: (version, number
    of tokens) of those that were sampled before the weights changed.
    """

    sample_index: int
    params: SamplingParams
    max_new_tokens: int
    _: KW_ONLY
    keeps_kv: bool = False
    earlier_weights: list[tuple[int, int]] = field(default_factory=list)
    sampled: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        if self.params.routed_experts:
            self.experts = ExpertRecord()

    @property
    def token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return [s.token_id for s in self.sampled]

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return (*self.prompt.token_ids, *self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.sampled)

    @property
    def last_token_id(self) -> int:
        return self.sampled[-1].token_id

    @property
    def next_position(self) -> int:
        """Position of the newest token, which the next decode step computes: as many tokens as have KV."""
        return len(self.prompt.token_ids) + len(self.sampled) - 1

    @property
    def max_length(self) -> int:
        return len(self.prompt.token_ids) + self.max_new_tokens

    @property
    def first_logits_place(self) -> int:
        """The newest token: the next is drawn from its logits. With a prompt that is to be scored, the first."""
        return 0 if self._num_unscored else len(self.prompt.token_ids) + len(self.sampled) - 1

    @property
    def _num_unscored(self) -> int:
        """Tokens of the prompt whose logprobs are asked for and not known. Nothing comes before the first."""
        return len(self.prompt.token_ids) - 1 - len(self.scores) if self.params.prompt_logprobs else 0

    def scored_positions(self, start: int, end: int) -> range:
        return range(start, min(end, len(self.prompt.token_ids) - 1)) if self._num_unscored else range(0)

    def target_at(self, place: int) -> int:
        return self.prompt.token_ids[place + 1]

    def restart(self, version: int | None) -> None:
        """Scores and experts of a prompt of which nothing was drawn yet are computed anew, too."""
        if self._num_unscored:
            super().restart(version)
        if version is not None:
            self.earlier_weights = list(self._spans(version))
        if self.experts is not None and not self.sampled:  # nothing was drawn by what ran
            self.experts = ExpertRecord()

    def continue_from(self, before: SampledRequest) -> bool:
        """Begin with all tokens of `before`, which has ended. Whether what is kept of it is of use.

        It is of none to who asks for the experts of tokens that ran when nobody asked.
        """
        if self.experts is not None and before.held_blocks:  # what is gone is run again, or found with its experts
            if before.experts is None:
                return False
            self.experts = before.experts.copy()
        self.continues = before
        return True

    @property
    def num_top(self) -> int:
        return self.params.top_logprobs

    def _spans(self, version: int) -> tuple[tuple[int, int], ...]:
        """`earlier_weights`, and behind them the tokens since, which those of `version` have sampled."""
        earlier = self.earlier_weights
        num_new = len(self.sampled) - sum(num_tokens for _, num_tokens in earlier)
        if earlier and earlier[-1][0] == version:  # the KV went, the weights stayed
            earlier, num_new = earlier[:-1], num_new + earlier[-1][1]
        return (*earlier, (version, num_new)) if num_new else tuple(earlier)

    def shares_prefill_with(self, other: Request) -> bool:
        """Whether both have the same prompt and none of a token, KV or scores of its own that the other has not."""
        return (
            isinstance(other, SampledRequest)
            and not (self.sampled or other.sampled or self.continues or other.continues)
            and len(self.scores) == len(other.scores)
            and (self.params.prompt_logprobs, self.num_top) == (other.params.prompt_logprobs, other.num_top)
            and ExpertRecord.are_alike(self.experts, other.experts)
            and (self.prompt is other.prompt or self.prompt.token_ids == other.prompt.token_ids)
        )

    def result(self, text: str | None, weights_version: int) -> RolloutResult:
        """What became of it, once it is finished; `text` is that of its tokens."""
        assert self.finish_reason and self.finished_s
        ttft_s = tpot_s = None
        if self.first_token_s is not None:
            ttft_s = self.first_token_s - self.submitted_s
            if len(self.sampled) > 1:
                tpot_s = (self.finished_s - self.first_token_s) / (len(self.sampled) - 1)
        is_scored = self.params.prompt_logprobs and not self._num_unscored
        has_top = self.params.top_logprobs > 0
        spans = self._spans(weights_version)
        return RolloutResult(
            id=self.prompt.id,
            prompt_index=self.prompt.index,
            sample_index=self.sample_index,
            prompt_token_ids=self.prompt.token_ids,
            token_ids=tuple(self.token_ids),
            text=text,
            logprobs=tuple(s.logprob for s in self.sampled),
            processed_logprobs=tuple(s.processed_logprob for s in self.sampled),
            finish_reason=self.finish_reason,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            weights_version=spans[-1][0] if spans else weights_version,
            top_logprobs=tuple(s.top for s in self.sampled) if has_top else None,
            prompt_logprobs=(None, *(s.logprob for s in self.scores)) if is_scored else None,
            prompt_top_logprobs=((), *(s.top for s in self.scores)) if is_scored and has_top else None,
            kept_mass=tuple(s.kept_mass for s in self.sampled) if self.params.cut_by else None,
            kept_token_ids=tuple(s.kept_ids for s in self.sampled) if self.params.kept_token_ids else None,
            routed_experts=None if self.experts is None else self.experts.array(),
            sampling=self.prompt.sampling,
            weights_versions=spans if len(spans) > 1 else None,
        )


@dataclass(eq=False)
class ScoredRequest(Request):
    """A prompt whose answer, `targets`, is given: both are computed in one prefill, and with it the request ends.

    prompt   5 6 7    all_token_ids  5 6 7 8      8 and 9 are scored by the logits at the places of 7 and 8;
    targets  8 9      scored places      2 3      behind 9 nothing is asked, so it is not computed
    """

    targets: tuple[int, ...]

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        return (*self.prompt.token_ids, *self.targets[:-1])

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.targets[:-1])

    @property
    def max_length(self) -> int:
        return len(self.prompt.token_ids) + len(self.targets)

    @property
    def first_logits_place(self) -> int:
        """The last token of the prompt, which predicts the first target."""
        return len(self.prompt.token_ids) - 1

    def scored_positions(self, start: int, end: int) -> range:
        return range(max(start, self.first_logits_place), end)

    def target_at(self, place: int) -> int:
        return self.targets[place - self.first_logits_place]

    def shares_prefill_with(self, other: Request) -> bool:
        """Never: answers differ. What their prompts have in common they find in the prefix cache."""
        return False

    def result(self) -> ScoreResult:
        """The scores of all targets, once it is finished."""
        return ScoreResult(tuple(s.logprob for s in self.scores), all(s.is_greedy for s in self.scores))


def in_waves(requests: Iterable[ScoredRequest]) -> tuple[list[ScoredRequest], list[ScoredRequest]]:
    """The first request of each prompt, and those that will find that prompt computed."""
    seen: set[tuple[int, ...]] = set()
    first: list[ScoredRequest] = []
    later: list[ScoredRequest] = []
    for request in requests:
        (later if request.prompt.token_ids in seen else first).append(request)
        seen.add(request.prompt.token_ids)
    return first, later


@dataclass(frozen=True)
class ScoreResult:
    """How likely the model finds a given continuation, in its raw distribution (temperature 1, nothing processed).

    Attributes:
        logprobs: one per token of the continuation, natural log.
        is_greedy: whether greedy decoding would have written all of it.
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

    Attributes:
        id: the prompt's.
        prompt_index: the prompt's place in the call, from 0.
        sample_index: which of the prompt's samples this is, from 0.
        prompt_token_ids: the prompt's tokens.
        token_ids: the answer's, with the stop token that ended it.
        text: the answer up to its first stop string; None without a tokenizer.
        logprobs: one per token of the answer, natural log, in the raw distribution (temperature 1, nothing processed).
        processed_logprobs: the same in the distribution that was sampled from; 0 under greedy decoding.
        finish_reason: "stop", "length", or "abort".
        ttft_s: seconds from submission to the first token; None without one, which only an abort can do.
        tpot_s: seconds per later token; None for a single token.
        weights_version: weight changes that the engine had been told of when the last token was sampled.
        top_logprobs: for each token the likeliest ones with their raw logprobs; None (and no key of an output line)
            unless asked for.
        prompt_logprobs: one per token of the prompt, as `logprobs`; None for the first, which nothing comes before.
            None (and no key) unless asked for.
        prompt_top_logprobs: for each token of the prompt the likeliest ones in its place, none for the first. None (and
            no key) unless both are asked for.
        kept_mass: one per token, the probability of all tokens that top_k, top_p and min_p kept, in the distribution
            that they cut: `processed_logprobs + log(kept_mass)` are logprobs of that distribution. None (and no key)
            where none of the three is asked for, and under greedy decoding.
        kept_token_ids: for each token those that were kept, ascending; None for a token where over 1024 were, one token
            under greedy decoding. None (and no key) unless asked for.
        routed_experts: `[tokens run, layers with experts, experts of a token]` int16, read-only: the experts that each
            token went through, in the order of the model's layers, and of its router. Row t is of the token at position
            t of prompt and answer; the last token of the answer was drawn and not run, so it has none. Counts for
            nothing in comparisons of results. None (and no key) unless asked for.
        sampling: what the prompt said of its own sampling; None (and no key of an output line) where it said nothing.
        weights_versions: (weights_version, number of tokens) for each span of the answer; None (and no key) unless the
            weights changed within it.
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
    ttft_s: float | None
    tpot_s: float | None
    weights_version: int
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    kept_mass: tuple[float, ...] | None = None
    kept_token_ids: tuple[tuple[int, ...] | None, ...] | None = None
    routed_experts: Experts | None = field(default=None, compare=False)
    sampling: OwnSampling | None = None
    weights_versions: tuple[tuple[int, int], ...] | None = None
