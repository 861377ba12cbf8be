"""Choosing tokens: one vectorised pass per set of sampling parameters, randomness by counter.

The random number of a token is a pure function of (seed, prompt id, sample, token index). There is no state to save or
to move, so a request may change rank, be batched with anything, or be computed again, and its text stays what it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cpinfer.config import SamplingParams
from cpinfer.engine.request import SampledRequest, SampledToken, TokenScore
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.models.logits import logits_processors


def sample_tokens(
    logits: Tensor, requests: Sequence[SampledRequest], stop_checker: StopChecker
) -> list[SampledToken | None]:
    """One token for each row of `logits [N, vocab]`, float32, chosen as each row's request wants. Empty for N = 0.

    A row that may not end yet (`min_new_tokens`) does not choose a token that would end it. None for a row that is left
    with no token to choose.
    """
    alike: dict[tuple[tuple[object, ...], tuple[int, ...]], list[int]] = {}
    for row, request in enumerate(requests):
        params = request.params
        may_end = len(request.sampled) >= params.min_new_tokens
        suppressed = () if may_end else stop_checker.stop_token_ids(params)
        alike.setdefault((params.distribution, suppressed), []).append(row)
    sampled: dict[int, SampledToken | None] = {}
    for (_, suppressed), rows in alike.items():
        chosen = _sample_alike(logits[rows], [requests[row] for row in rows], suppressed)
        sampled.update(zip(rows, chosen, strict=True))
    return [sampled[row] for row in range(len(requests))]


def _sample_alike(
    logits: Tensor, requests: list[SampledRequest], suppressed: tuple[int, ...]
) -> list[SampledToken | None]:
    """Sample rows whose requests share the shape of their distribution."""
    params = requests[0].params
    scores = _process(logits, requests, params, suppressed)
    has_token = torch.ones(len(requests), dtype=torch.bool)
    # Nothing else takes the last token away: logits are checked, and the other processors keep the likeliest.
    if suppressed:
        has_token = scores.amax(dim=-1) > -torch.inf
        scores = scores.masked_fill(~has_token.unsqueeze(-1), 0.0)  # whatever is drawn there is not used
    if params.greedy:
        tokens = scores.argmax(dim=-1)
        processed = torch.zeros(len(requests))
    else:
        logprobs = torch.log_softmax(scores, dim=-1)
        tokens = _draw(logprobs, uniforms(requests))
        processed = _pick(logprobs, tokens)
    raw = torch.log_softmax(logits, dim=-1)
    top = _likeliest(raw, params.top_logprobs)
    rows = zip(tokens.tolist(), _pick(raw, tokens).tolist(), processed.tolist(), top, strict=True)
    return [SampledToken(*row) if has else None for row, has in zip(rows, has_token.tolist(), strict=True)]


def score_tokens(logits: Tensor, targets: Sequence[int], num_top: int = 0) -> list[TokenScore]:
    """How likely each row of `logits [N, vocab]`, float32, finds its target, and its `num_top` likeliest tokens.

    Empty for N = 0.
    """
    if not targets:
        return []
    tokens = torch.tensor(targets, device=logits.device)
    raw = torch.log_softmax(logits, dim=-1)
    is_greedy = logits.argmax(dim=-1) == tokens
    scores = zip(_pick(raw, tokens).tolist(), is_greedy.tolist(), _likeliest(raw, num_top), strict=True)
    return [TokenScore(*score) for score in scores]


def _process(
    logits: Tensor, requests: list[SampledRequest], params: SamplingParams, suppressed: tuple[int, ...]
) -> Tensor:
    processors: Callable[[Tensor, Tensor], Tensor] = logits_processors(params, suppressed)
    if params.repetition_penalty == 1:
        # Nothing else looks at the text so far; one token stands in for it.
        stand_in = torch.zeros(len(requests), 1, dtype=torch.long, device=logits.device)
        return processors(stand_in, logits.clone())
    # The penalty looks at the text so far, whose length differs from row to row.
    histories = [torch.tensor([s.all_token_ids], device=logits.device) for s in requests]
    return torch.cat([processors(h, logits[i : i + 1].clone()) for i, h in enumerate(histories)])


def _likeliest(logprobs: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    """For each row its likeliest tokens that are possible, and their logprobs."""
    if not num_top:
        return [()] * len(logprobs)
    values, ids = (x.tolist() for x in logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1))
    return [tuple((i, p) for i, p in zip(*row, strict=True) if p > -math.inf) for row in zip(ids, values, strict=True)]


def _draw(logprobs: Tensor, uniforms: list[float]) -> Tensor:
    """Where each uniform number falls in the cumulative distribution, tokens in order of their ids."""
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    at = torch.tensor(uniforms, dtype=torch.float64, device=logprobs.device) * cumulative[:, -1]
    # right=True: a token without probability ends where it starts and can never be met.
    return torch.searchsorted(cumulative, at.unsqueeze(-1), right=True).squeeze(-1)


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def uniforms(requests: Sequence[SampledRequest]) -> list[float]:
    """The random numbers in [0, 1) of the requests' next tokens (Philox, Salmon et al., SC 2011)."""
    generator = np.random.Philox(key=0)
    state = generator.state  # one generator put to each place: making one takes six times as long
    counter, key = state["state"]["counter"], state["state"]["key"]
    found = []
    for s in requests:
        prompt_key = int.from_bytes(hashlib.blake2b(s.prompt.id.encode(), digest_size=8).digest())
        # Number by number: numpy would turn a list with large numbers into floats, and ids would share numbers.
        counter[0], counter[1], counter[2], counter[3] = len(s.sampled), s.sample_index, prompt_key, 0
        key[0] = s.params.seed
        generator.state = state
        found.append((int(generator.random_raw()) >> 11) / 2**53)
    return found
