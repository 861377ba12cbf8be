"""When an answer ends: at a stop token, or where its text shows a stop string."""

from __future__ import annotations

from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.engine.request import SampledRequest


class StopChecker:
    """Knows the model's end-of-text tokens and, where there is a tokenizer, reads the text so far."""

    def __init__(self, eos_token_ids: tuple[int, ...], tokenizer: Any | None) -> None:
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer

    def stops(self, request: SampledRequest) -> bool:
        """Whether the newest token ends the request."""
        params = request.params
        if len(request.sampled) < params.min_new_tokens:
            return False
        if request.last_token_id in self.stop_token_ids(params):
            return True
        if not params.stop:
            return False
        # A string of c characters that the newest token completes began at most 4 * c tokens ago (bytes of UTF-8).
        window = 4 * max(map(len, params.stop)) + 4
        text = self._decode(request.token_ids[-window:])
        return any(stop in text for stop in params.stop)

    def stop_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end an answer, ascending."""
        eos = () if params.ignore_eos else self._eos_token_ids
        return tuple(sorted({*params.stop_token_ids, *eos}))

    def text(self, request: SampledRequest) -> str | None:
        """The answer's text up to its first stop string, special tokens left out; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        text = self._decode(request.token_ids)
        starts = [text.find(stop) for stop in request.params.stop if stop in text]
        return text[: min(starts)] if starts else text

    def _decode(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None, "the engine refuses stop strings without a tokenizer"
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
