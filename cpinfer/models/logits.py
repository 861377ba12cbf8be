"""Which tokens may be chosen: Transformers' own logits processors, built from sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpinfer.config import SamplingParams


def logits_processors(params: SamplingParams, suppressed: Sequence[int] = ()) -> Any:
    """A callable `(input_ids [N, L], scores [N, vocab]) -> scores`: all that comes before a cut, in `generate`'s order.

    `suppressed` tokens cannot be chosen. Under greedy decoding only what can change the likeliest token is left.
    """
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if suppressed:
        processors.append(SuppressTokensLogitsProcessor(list(suppressed)))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=params.repetition_penalty))
    if not params.greedy and params.temperature != 1:
        processors.append(TemperatureLogitsWarper(params.temperature))
    return processors


def logits_cuts(params: SamplingParams) -> Any:
    """A callable like those of `logits_processors`, to follow them: what cuts to a kept set. It reads no `input_ids`.

    Empty where nothing cuts. The likeliest token is always kept.
    """
    processors = LogitsProcessorList()
    if params.greedy:
        return processors
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(top_p=params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(min_p=params.min_p))
    return processors
