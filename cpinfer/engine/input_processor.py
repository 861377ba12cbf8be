"""What callers give, as requests that can run; or the UserError that says why not, before anything runs."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpinfer.config import SamplingParams
from cpinfer.engine.agreement import Prepared, pack_token_lists
from cpinfer.engine.pooled_prompts import PooledPrompts, SamplePlaces, TokenIds
from cpinfer.engine.prompts import (
    PromptLike,
    PromptsLike,
    as_pairs,
    as_prompt,
    as_prompts,
    as_sampling,
    as_token_lists,
    as_turn,
    check_distinct,
    check_length,
    check_prompt,
    check_sampling,
    check_scored_length,
    check_tokens,
    naming,
    refuse_sampling,
    sampling_of,
)
from cpinfer.engine.request import Prompt, SampledRequest, ScoredRequest
from cpinfer.engine.suspicions import SpecialTokens, Suspicion
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.logs import RankLogger
from cpinfer.models.spec import ModelSpec
from cpinfer.refusals import refuse


class InputProcessor:
    """Makes requests for a model and a pool. What it prepares names what the ranks of a replica must have in common.

    What can run and is hardly meant is said to the log, of each kind the first. `unseen_experts`: of the model those
    whose choice cannot be seen, in words.
    """

    def __init__(
        self,
        spec: ModelSpec,
        pool_size: PoolSize,
        tokenizer: Any | None,
        log: RankLogger,
        unseen_experts: str | None = None,
    ) -> None:
        self._spec = spec
        self._pool_size = pool_size
        self._tokenizer = tokenizer
        self._log = log
        self._unseen_experts = unseen_experts
        self._special = SpecialTokens.of(spec, tokenizer)
        self._said: set[str] = set()

    def samples(
        self,
        prompts: PromptsLike,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        skip: frozenset[tuple[int, int]],
        name: str,
    ) -> Prepared[list[SampledRequest]]:
        """A request for each sample of each prompt but those to skip, by (prompt, sample).

        What a prompt says of its own sampling wins. `name` is that of the call, by which prompts are named that have no
        id.
        """
        given = as_prompts(prompts)
        each = as_sampling(sampling, len(given))
        self._refuse_unknowable(each)
        wanted = []
        for index, prompt in enumerate(given):
            with naming("prompt", index):
                made, each[index] = self._as_wanted(prompt, index, each[index], f"{name}/{index}")
                wanted.append(made)
        check_distinct(wanted, [params.seed for params in each])
        self._suspect([prompt.token_ids for prompt in wanted], each)
        distinct = {params: i for i, params in enumerate(dict.fromkeys(each))}
        return Prepared(
            self._requests(wanted, each, skip),
            lambda: {
                "sampling": each[0] if len(distinct) == 1 else [list(distinct), [distinct[params] for params in each]],
                "skip": sorted(skip),
                "prompts": wanted,
            },
        )

    def checked(
        self, given: PromptLike, index: int, sampling: SamplingParams, default_id: str
    ) -> tuple[Prompt, SamplingParams]:
        """One prompt that can run, and how it is sampled. UserError otherwise."""
        params = self._readable(sampling)
        prompts = as_prompts(given)
        if len(prompts) != 1:
            raise UserError(f"found {len(prompts)} prompts; one was wanted. Add each by itself.")
        made, params = self._as_wanted(prompts[0], index, params, default_id)
        self._suspect([made.token_ids], [params])
        return made, params

    def checked_turn(self, before: Sequence[int], given: Any, sampling: SamplingParams) -> TokenIds:
        """The token ids of a turn behind those of its session. UserError for one that can never run."""
        params = self._readable(sampling)
        if params.n != 1 or params.prompt_logprobs:
            raise UserError("a turn of a session is one sample without prompt_logprobs; add a request for others.")
        new = as_turn(given)
        check_sampling(params, self._spec)
        check_tokens(new, self._spec)
        check_length(len(before) + len(new), params, self._spec, self._pool_size)
        return new

    def _readable(self, sampling: Any) -> SamplingParams:
        [params] = as_sampling(sampling, 1)
        self._refuse_unknowable([params])
        return params

    def requests(self, prompt: Prompt, sampling: SamplingParams) -> list[SampledRequest]:
        """A request for each sample of a prompt that has been checked."""
        return self._requests([prompt], [sampling], frozenset())

    def scored(self, pairs: Iterable[tuple[PromptLike, Sequence[int]]]) -> Prepared[list[ScoredRequest]]:
        """A request for each pair of a prompt and its continuation."""
        requests = []
        for index, pair in enumerate(as_pairs(pairs)):
            with naming("pair", index):
                requests.append(self._to_score(index, *pair))
        self._suspect([request.prompt.token_ids for request in requests], [])
        return Prepared(requests, lambda: {"pairs": [(r.prompt.token_ids, r.targets) for r in requests]})

    def _to_score(self, index: int, given: PromptLike, continuation: Sequence[int]) -> ScoredRequest:
        prompt = refuse_sampling(as_prompt(given, index, self._tokenizer))
        targets = tuple(continuation)
        if not targets:
            raise UserError("the continuation is empty; at least one token was wanted.")
        check_tokens(prompt.token_ids, self._spec)
        check_tokens(targets, self._spec)
        check_scored_length(len(prompt.token_ids), len(targets), self._spec, self._pool_size)
        return ScoredRequest(prompt, targets)

    def packed(
        self, own_prompts: PromptsLike, sampling: SamplingParams | None, name: str, num_copies: int, num_ranks: int
    ) -> Prepared[NDArray[np.int64]]:
        """This rank's prompts as one row of numbers, with a number of its own in front, by which to name the batch."""
        params = sampling or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise UserError(f"found a {type(params).__name__} for sampling; SamplingParams were wanted.")
        self._refuse_unknowable([params])
        if type(num_copies) is not int or num_copies < 1 or num_ranks % num_copies:
            raise UserError(f"num_copies is {num_copies!r}; a divisor of the replica's {num_ranks} rank(s) was wanted.")
        own = as_token_lists(own_prompts, self._tokenizer)
        for i, tokens in enumerate(own):
            with naming("prompt", i):
                check_prompt(Prompt(i, str(i), tokens), params, self._spec, self._pool_size)
        self._suspect(own, [params])
        packed = pack_token_lists([[secrets.randbits(62)], *own])
        same: Mapping[str, object] = {"sampling": params, "name": name, "num_copies": num_copies}
        return Prepared(packed, lambda: same, number=len(packed))

    def pooled(
        self, asked: Sequence[Sequence[TokenIds]], num_copies: int, sampling: SamplingParams | None, name: str
    ) -> tuple[list[SampledRequest], Sequence[SamplePlaces]]:
        """A request for each sample that any rank asks for, and for each owner the (prompt, sample) that are its own.

        Ranks have checked what they ask for. `num_copies` neighbours are one owner; prompt i is named `name/i`.
        """
        params = sampling or SamplingParams()
        pooled = PooledPrompts.of_ranks(asked, num_copies)
        prompts = [Prompt(i, f"{name}/{i}", tokens) for i, tokens in enumerate(pooled.prompts)]
        each = [dataclasses.replace(params, n=n) for n in pooled.counts]
        return self._requests(prompts, each, frozenset()), pooled.places

    def _requests(
        self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], skip: frozenset[tuple[int, int]]
    ) -> list[SampledRequest]:
        requests = []
        for prompt, params in zip(prompts, sampling, strict=True):
            room = self._spec.max_positions - len(prompt.token_ids)
            for sample_index in range(params.n):
                if (prompt.index, sample_index) not in skip:
                    requests.append(SampledRequest(prompt, sample_index, params, min(params.max_new_tokens, room)))
        return requests

    def _as_wanted(
        self, given: PromptLike, index: int, params: SamplingParams, default_id: str
    ) -> tuple[Prompt, SamplingParams]:
        prompt = as_prompt(given, index, self._tokenizer, default_id)
        if prompt.sampling:
            params = sampling_of(prompt, params)
            self._refuse_unknowable([params])
        check_prompt(prompt, params, self._spec, self._pool_size)
        return prompt, params

    def _refuse_unknowable(self, sampling: Sequence[SamplingParams]) -> None:
        if self._tokenizer is None and any(params.stop for params in sampling):
            raise UserError("stop strings need a tokenizer: give one to attach, or use stop_token_ids.")
        has_experts = self._spec.experts_per_token is not None  # else the keys are refused together
        if has_experts and self._unseen_experts and any(params.routed_experts for params in sampling):
            raise refuse("routed_experts", self._unseen_experts)

    def _suspect(self, prompts: Sequence[TokenIds], sampling: Sequence[SamplingParams]) -> None:
        """Tell the log of what is hardly meant, once of each kind; the first rank does for its replica."""
        found: list[Suspicion] = []
        for params in dict.fromkeys(sampling):
            found += self._special.in_sampling(params)
        for index, token_ids in enumerate(prompts):
            found += self._special.in_prompt(index, token_ids)
        for suspicion in found:
            if suspicion.kind not in self._said:
                self._said.add(suspicion.kind)
                self._log.shared_warning(suspicion.text)
