"""Answers that grow, by a tokenizer's response template: which part is text, which is thought, which calls a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser


def response_parser(tokenizer: Any, prompt_ids: Sequence[int], tools: Sequence[Mapping[str, Any]] | None) -> Any | None:
    """Transformers' parser of an answer that comes in pieces, None where the tokenizer has no response template.

    Args:
        tokenizer: the model's.
        prompt_ids: what stands before the answer; templates begin messages there.
        tools: JSON schemas of those that it may call.

    Returns:
        A `ResponseParser`, with all special tokens in the text that it is fed.
    """
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    return ResponseParser(template, prefix=tokenizer.decode(list(prompt_ids)), tools=tools and [*tools])
