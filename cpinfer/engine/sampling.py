"""Choosing tokens: one vectorised pass per set of sampling parameters, randomness by counter.

The random numbers of a token are a pure function of (seed, prompt id, sample, token index): a request may change rank,
be batched with anything, or be computed again. That changes the last bits of its logits, and with them a token only
where two tokens, or two groups of tokens, come out nearly equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from cpinfer.config import SamplingParams
from cpinfer.engine.random_numbers import exponentials
from cpinfer.engine.request import SampledRequest
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.engine.token_records import KeptIds, TokenRecords
from cpinfer.models.logits import logits_cuts, logits_processors, processed, without_tokens
from cpinfer.ops.draws import draw, likeliest, logprobs_of, num_random, top_logprobs
from cpinfer.ops.staging import Staging
from cpinfer.ops.trained_logprobs import trained_logprobs

# As many as `top_logprobs` may ask for: larger sets of kept ids are not reported.
MAX_KEPT_IDS = 1024


def sample_tokens(
    logits: Tensor, requests: Sequence[SampledRequest], stop_checker: StopChecker, *, as_trained: bool = False
) -> TokenRecords:
    """One token for each row of `logits [N, vocab]`, float32, chosen as each row's request wants. Empty for N = 0.

    A row that may not end yet (`min_new_tokens`) does not choose a token that would end it. None for a row that is left
    with no token to choose. Of logits that are not finite some token comes, which means nothing. `as_trained`:
    processed logprobs are computed as trainers do it, where nothing but the temperature made them.
    """
    alike: dict[tuple[tuple[object, ...], tuple[int, ...]], list[int]] = {}
    shapes: dict[tuple[int, bool], list[int]] = {}  # of rows whose requests were given the same parameters
    for row, request in enumerate(requests):
        params = request.params
        is_free = not params.min_new_tokens or len(request.sampled) >= params.min_new_tokens
        rows = shapes.get((id(params), is_free))
        if rows is None:
            suppressed = () if is_free else stop_checker.stop_token_ids(params)
            rows = shapes[id(params), is_free] = alike.setdefault((params.distribution, suppressed), [])
        rows.append(row)
    parts = []
    for (_, suppressed), rows in alike.items():
        those = logits if len(alike) == 1 else logits[rows]
        own = [requests[row] for row in rows]
        parts.append((rows, _sample_alike(those, own, suppressed, as_trained=as_trained)))
    return TokenRecords.joined(parts, len(requests)) if parts else TokenRecords.none(logits.device)


def _sample_alike(
    logits: Tensor, requests: list[SampledRequest], suppressed: tuple[int, ...], *, as_trained: bool
) -> TokenRecords:
    """Sample rows whose requests share the shape of their distribution."""
    params = requests[0].params
    scores, has_token = _process(logits, requests, params, suppressed), None
    # Nothing else takes the last token away: logits are checked, and the cuts keep the likeliest. What is drawn where
    # none is left, and said of it, is not used.
    if suppressed:
        has_token = scores.amax(dim=-1) > -torch.inf
    own = given = masses = None
    kept: KeptIds = ()
    if params.greedy:
        tokens = likeliest(scores)
        if params.kept_token_ids:
            kept = [(token,) for token in tokens.tolist()]
    else:
        chosen_from = processed(logits_cuts(params), None, scores)
        # Made while the device is still at the model: they are a copy of their own.
        numbers = Staging(logits.device).put(exponentials(requests, num_random(logits.shape[-1])))
        tokens, given = draw(chosen_from, numbers)
        own = given if chosen_from is logits else None
        # What `min_new_tokens` does is in `suppressed`: of the key itself these rows may have different values.
        is_plain = not (suppressed or params.cut_by or {*params.shaped_by} - {"min_new_tokens"})
        if as_trained and is_plain:
            given = trained_logprobs(logits, tokens, params.temperature)
        if params.cut_by:
            masses = _kept_mass(scores, chosen_from)
        if params.kept_token_ids:
            kept = _kept_ids(chosen_from)
    if own is None:  # something shaped them
        own = logprobs_of(logits, tokens)
    top = _likeliest(logits, params.top_logprobs)
    return TokenRecords.of(tokens, own, given, masses, has_token, top, kept)


def _kept_mass(scores: Tensor, chosen_from: Tensor) -> Tensor:
    """`[N]`: the probability under `scores [N, vocab]` of what is possible under `chosen_from`, their cut.

    A cut divides by that mass, so one token tells it: the likeliest, which is always kept and nearest to 1.
    """
    tokens = likeliest(scores)
    return (logprobs_of(scores, tokens) - logprobs_of(chosen_from, tokens)).exp().clamp(max=1.0)


def _kept_ids(chosen_from: Tensor) -> list[tuple[int, ...] | None]:
    """For each row its possible tokens, ascending; None for more than `MAX_KEPT_IDS`."""
    is_kept = chosen_from > -torch.inf
    counts = is_kept.sum(dim=-1, keepdim=True)
    ids = iter((is_kept & (counts <= MAX_KEPT_IDS)).nonzero()[:, 1].tolist())
    return [tuple(islice(ids, n)) if n <= MAX_KEPT_IDS else None for n in counts.flatten().tolist()]


def score_tokens(logits: Tensor, targets: Tensor, num_top: int = 0) -> TokenRecords:
    """How likely each row of `logits [N, vocab]`, float32, finds its target, of `[N]`, and its likeliest tokens.

    The token of a row is 1 where its target is the likeliest, else 0. Empty for N = 0.
    """
    if not len(targets):
        return TokenRecords.none(logits.device)
    is_greedy = (likeliest(logits) == targets).int()
    return TokenRecords.of(is_greedy, logprobs_of(logits, targets), top=_likeliest(logits, num_top))


def _process(
    logits: Tensor, requests: list[SampledRequest], params: SamplingParams, suppressed: tuple[int, ...]
) -> Tensor:
    """Logits as they are before a cut; `logits` itself where nothing changes them."""
    # Whatever stands beside it, a token at -inf stays there.
    scores, processors = without_tokens(logits, suppressed), logits_processors(params)
    if not processors:
        return scores
    if params.repetition_penalty == 1:
        # Nothing else looks at the text so far; one token stands in for it.
        stand_in = torch.zeros(len(requests), 1, dtype=torch.long, device=logits.device)
        return processed(processors, stand_in, scores.clone())
    # The penalty looks at the text so far, whose length differs from row to row.
    histories = [torch.tensor([s.all_token_ids], device=logits.device) for s in requests]
    return torch.cat([processed(processors, h, scores[i : i + 1].clone()) for i, h in enumerate(histories)])


def _likeliest(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor] | None:
    """For each row the ids of its likeliest tokens, and their logprobs; None where none are asked for."""
    return top_logprobs(logits, min(num_top, logits.shape[-1])) if num_top else None
