"""Which tokens may be chosen: Transformers' own logits processors, built from sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpinfer.config import SamplingParams


def logits_processors(params: SamplingParams) -> list[Any]:
    """Callables `(input_ids [N, L], scores [N, vocab]) -> scores`: all that comes before a cut, in `generate`'s order.

    Under greedy decoding only what can change the likeliest token is left.
    """
    processors: list[Any] = []
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=params.repetition_penalty))
    if not params.greedy and params.temperature != 1:
        processors.append(TemperatureLogitsWarper(params.temperature))
    return processors


def logits_cuts(params: SamplingParams) -> list[Any]:
    """Callables like those of `logits_processors`, to follow them: what cuts to a kept set. They read no `input_ids`.

    None where nothing cuts. The likeliest token is always kept.
    """
    processors: list[Any] = []
    if params.greedy:
        return processors
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(top_p=params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(min_p=params.min_p))
    return processors


def processed(processors: Sequence[Any], input_ids: Tensor | None, scores: Tensor) -> Tensor:
    """Scores as all `processors` make them; `scores` itself where there are none.

    Transformers' own list of them looks up, in every step, what arguments each of them takes.
    """
    for processor in processors:
        scores = processor(input_ids, scores)
    return scores


def without_tokens(scores: Tensor, suppressed: Sequence[int]) -> Tensor:
    """`scores [N, vocab]`, of which `suppressed` tokens cannot be chosen; `scores` itself where none of them is."""
    here = [token for token in suppressed if 0 <= token < scores.shape[-1]]
    return scores.index_fill(-1, torch.tensor(here, device=scores.device), -torch.inf) if here else scores
