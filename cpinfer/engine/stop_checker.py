"""When an answer ends: at a stop token, or where its text shows a stop string.

Stop strings are looked for in the text that all tokens make, special ones included, as Transformers has it; the text
that callers see leaves special tokens out. Nothing before the answer counts, and nothing that is complete before
`min_new_tokens` are there.

    tokens           the    valley   <|im_end|>
    looked through   "the valley<|im_end|>"          stop "<|im_end|>" or "y<|im" is found here
    text             "the valley"                    up to where the stop string begins
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.engine.request import SampledRequest

# What bytes are shown as that make no character by themselves.
_PART = "\N{REPLACEMENT CHARACTER}"


class StopChecker:
    """Knows the model's end-of-text tokens and, where there is a tokenizer, reads the text so far."""

    def __init__(self, eos_token_ids: tuple[int, ...], tokenizer: Any | None) -> None:
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer

    def stops(self, request: SampledRequest) -> bool:
        """Whether the newest token ends the request."""
        params, token = request.params, request.last_token_id
        if token in params.stop_token_ids or (token in self._eos_token_ids and not params.ignore_eos):
            return len(request.sampled) > params.min_new_tokens
        if not params.stop:
            return False
        assert self._tokenizer is not None, "the engine refuses stop strings without a tokenizer"
        return stop_begins_at(self._tokenizer, request.token_ids, params) is not None

    def stop_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end an answer, ascending."""
        eos = () if params.ignore_eos else self._eos_token_ids
        return tuple(sorted({*params.stop_token_ids, *eos}))

    def text(self, request: SampledRequest) -> str | None:
        """The answer's text up to the stop string that ended it, special tokens left out; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return shown_text(self._tokenizer, request.token_ids, request.params)


def stop_begins_at(tokenizer: Any, token_ids: Sequence[int], params: SamplingParams) -> tuple[int, int] | None:
    """Where the first stop string begins that the last token completes: None when it completes none.

    `(start, offset)`: at character `offset` of the text that the tokens from `start` on make.
    """
    if not params.stop or len(token_ids) <= params.min_new_tokens:
        return None
    # A string of c characters that the newest token completes began at most 4 * c tokens ago (bytes of UTF-8).
    longest = max(map(len, params.stop))
    start = _before_parts(tokenizer, token_ids, max(0, len(token_ids) - 4 * longest - 4))
    text = _whole_text(tokenizer, token_ids, start, len(token_ids))
    while start > 0 and len(text) <= longest:  # of tokens that are no text, as those of a padded vocabulary
        start = _before_parts(tokenizer, token_ids, max(0, 2 * start - len(token_ids)))
        text = _whole_text(tokenizer, token_ids, start, len(token_ids))
    stops = [stop for stop in params.stop if stop in text]
    if not stops:  # as a rule
        return None
    # From here on it is the last token's doing; that may also make a character whole that others began.
    before = _whole_text(tokenizer, token_ids, start, len(token_ids) - 1)
    is_new = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
    offsets = [text.find(stop, max(0, is_new - len(stop) + 1)) for stop in stops]
    offset = min((offset for offset in offsets if offset >= 0), default=None)
    return None if offset is None else (start, offset)


def shown_text(tokenizer: Any, token_ids: Sequence[int], params: SamplingParams) -> str:
    """The text of an answer without special tokens, up to the stop string that its last token completes, if any."""
    shown = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    found = stop_begins_at(tokenizer, token_ids, params)
    if found is None:
        return shown
    start, offset = found
    # Special tokens behind the stop string's beginning are not shown, so that they are not to be cut off either.
    num_hidden, special = 0, {*tokenizer.all_special_ids}
    for place in range(start, len(token_ids)):
        if token_ids[place] in special:
            begin, end = (len(_whole_text(tokenizer, token_ids, start, stop)) for stop in (place, place + 1))
            num_hidden += max(0, end - max(begin, offset))
    num_cut = len(_whole_text(tokenizer, token_ids, start, len(token_ids))) - offset - num_hidden
    return shown[: max(0, len(shown) - num_cut)]


def _whole_text(tokenizer: Any, token_ids: Sequence[int], start: int, end: int) -> str:
    """The text of tokens `[start, end)` of an answer, special ones included.

    Some tokenizers drop a space at the beginning of a text. That of an answer has its own, as behind another token; one
    that begins later begins ahead of all that is looked for.
    """

    first = list(token_ids[: min(1, end)])
    lead = "" if start else _decoded(tokenizer, first)
    # Bytes of a character are no text with a space of its own, and twice the same would make none whole.
    if start or _PART in lead:
        return _decoded(tokenizer, token_ids[start:end])
    return _decoded(tokenizer, [*first, *token_ids[:end]])[len(lead) :]


def _before_parts(tokenizer: Any, token_ids: Sequence[int], start: int) -> int:
    """`start`, or where the bytes of characters begin that it lies in: some decoders show none of a run cut in two."""
    while start > 0 and any(_PART in _decoded(tokenizer, [token]) for token in token_ids[start - 1 : start + 1]):
        start -= 1
    return start


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, spaces_between_special_tokens=False))
