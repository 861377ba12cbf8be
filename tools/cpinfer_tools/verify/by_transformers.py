"""Sampling parameters as Transformers' own `generate` takes them: said in full, so that nothing is the model's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria

from cpinfer.config import SamplingParams
from cpinfer.engine.stop_checker import StopChecker, stop_begins_at
from cpinfer.models.generation_config import OTHER_KEYS


def generation_options(model: Any, params: SamplingParams, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Keywords of `model.generate` that mean what `params` mean, but for stop strings and the length of an answer.

    What a chat model's generation_config asks for beside them, also of greedy text, is told to ask for nothing.
    """
    own = model.generation_config
    ends = StopChecker(eos_token_ids, None).stop_token_ids(params)
    options: dict[str, Any] = {
        **{key: neutral for key, neutral in OTHER_KEYS.items() if getattr(own, key, None) not in (None, neutral)},
        "repetition_penalty": params.repetition_penalty,
        "sequence_bias": {(token,): bias for token, bias in params.logit_bias} or None,
        "min_new_tokens": params.min_new_tokens,
        "eos_token_id": list(ends) or None,
        "do_sample": not params.greedy,
    }
    if not params.greedy:
        options |= {key: getattr(params, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    return options


class StopsInAnswer(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends a `generate` of one row where its answer ends by a stop string: the rule of `cpinfer.engine.stop_checker`.

    Transformers' own `stop_strings` look at the end of the prompt too, and within the minimum.
    """

    def __init__(self, tokenizer: Any, num_prompt: int, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._num_prompt = num_prompt
        self._params = params

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        answer = input_ids[0, self._num_prompt :].tolist()
        ended = stop_begins_at(self._tokenizer, answer, self._params) is not None
        return torch.tensor([ended], device=input_ids.device)
