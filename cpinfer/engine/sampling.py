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
from torch.nn.functional import pad

from cpinfer.config import SamplingParams
from cpinfer.engine.random_numbers import exponentials
from cpinfer.engine.request import SampledRequest
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.engine.token_records import KeptIds, TokenRecords
from cpinfer.models.logits import logits_cuts, logits_processors, processed, without_tokens
from cpinfer.ops.staging import Staging
from cpinfer.ops.trained_logprobs import trained_logprobs

# As many as `top_logprobs` may ask for: larger sets of kept ids are not reported.
MAX_KEPT_IDS = 1024

# About the square root of a vocabulary, and most vocabularies are a multiple of it.
GROUP_SIZE = 128


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
    given = masses = raw = None
    kept: KeptIds = ()
    if params.greedy:
        tokens = scores.argmax(dim=-1)
        if params.kept_token_ids:
            kept = [(token,) for token in tokens.tolist()]
    else:
        chosen_from = processed(logits_cuts(params), None, scores)
        logprobs = torch.log_softmax(chosen_from, dim=-1)
        raw = logprobs if chosen_from is logits else None
        tokens = _draw(logprobs, requests)
        # What `min_new_tokens` does is in `suppressed`: of the key itself these rows may have different values.
        is_plain = not (suppressed or params.cut_by or {*params.shaped_by} - {"min_new_tokens"})
        if as_trained and is_plain:
            given = trained_logprobs(logits, tokens, params.temperature)
        else:
            given = _pick(logprobs, tokens)
        if params.cut_by:
            masses = _kept_mass(torch.log_softmax(scores, dim=-1), logprobs)
        if params.kept_token_ids:
            kept = _kept_ids(logprobs)
    if raw is None:  # something shaped them
        raw = torch.log_softmax(logits, dim=-1)
    top = _likeliest(raw, params.top_logprobs)
    return TokenRecords.of(tokens, _pick(raw, tokens), given, masses, has_token, top, kept)


def _kept_mass(uncut: Tensor, logprobs: Tensor) -> Tensor:
    """`[N]`: the probability under `uncut [N, vocab]` of what is possible under `logprobs`, its cut.

    A cut divides by that mass, so one token tells it: the likeliest, which is always kept and nearest to 1.
    """
    return (uncut.amax(dim=-1) - logprobs.amax(dim=-1)).exp().clamp(max=1.0)


def _kept_ids(logprobs: Tensor) -> list[tuple[int, ...] | None]:
    """For each row its possible tokens, ascending; None for more than `MAX_KEPT_IDS`."""
    is_kept = logprobs > -torch.inf
    counts = is_kept.sum(dim=-1, keepdim=True)
    ids = iter((is_kept & (counts <= MAX_KEPT_IDS)).nonzero()[:, 1].tolist())
    return [tuple(islice(ids, n)) if n <= MAX_KEPT_IDS else None for n in counts.flatten().tolist()]


def score_tokens(logits: Tensor, targets: Tensor, num_top: int = 0) -> TokenRecords:
    """How likely each row of `logits [N, vocab]`, float32, finds its target, of `[N]`, and its likeliest tokens.

    The token of a row is 1 where its target is the likeliest, else 0. Empty for N = 0.
    """
    if not len(targets):
        return TokenRecords.none(logits.device)
    raw = torch.log_softmax(logits, dim=-1)
    is_greedy = (logits.argmax(dim=-1) == targets).int()
    return TokenRecords.of(is_greedy, _pick(raw, targets), top=_likeliest(raw, num_top))


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


def _likeliest(logprobs: Tensor, num_top: int) -> tuple[Tensor, Tensor] | None:
    """For each row the ids of its likeliest tokens, and their logprobs; None where none are asked for."""
    if not num_top:
        return None
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return ids, values


def _draw(logprobs: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """A token for each row of `logprobs [N, vocab]`, by two exponential races.

    A race is won by the smallest e_i / p_i, e_i exponentially distributed with mean 1: by i with probability p_i, and
    the winner changes with rounding only where two are nearly equal. (It is Gumbel-max, argmax of log p_i - log e_i.)
    First groups of `GROUP_SIZE` tokens race, each with the probability of its tokens together, then the tokens of the
    group that won. So a row needs vocab / GROUP_SIZE + GROUP_SIZE random numbers, not one for each token:

        numbers of a row   [ GROUP_SIZE of the tokens of a group | one for each group, in order of token ids ]

    Equal times are won by the lower token id.
    """
    vocab_size = logprobs.shape[-1]
    # float32 will do: a group's sum is off by 1e-6 of it at most, and logits differ between layouts by more.
    probs = logprobs.exp()
    if vocab_size % GROUP_SIZE:
        probs = pad(probs, (0, -vocab_size % GROUP_SIZE))
    probs = probs.view(len(logprobs), -1, GROUP_SIZE)
    # Made while the device is still at the model: they are a copy of their own.
    numbers = Staging(probs.device).put(exponentials(requests, GROUP_SIZE + probs.shape[1]))
    # Divided by 0 they are infinite: what has no probability wins against nothing.
    groups = (numbers[:, GROUP_SIZE:] / probs.sum(dim=-1)).argmin(dim=-1)
    within = probs[torch.arange(len(probs), device=probs.device), groups]
    places: Tensor = (numbers[:, :GROUP_SIZE] / within).argmin(dim=-1)
    # Of probabilities that are not finite the last place may win, behind the vocabulary.
    return (groups * GROUP_SIZE + places).clamp(max=vocab_size - 1)


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
