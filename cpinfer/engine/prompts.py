"""Prompts: what a user may write, turned into token ids, and whether they can ever run."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.models.spec import ModelSpec

PromptLike = Prompt | str | Sequence[int] | Mapping[str, Any]
_FORMS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True)
class InputLine:
    """A prompt of an input file: its line number there, and the answer the file expects, if it names one."""

    number: int
    prompt: Prompt
    answer: str | None


def as_prompt(given: PromptLike, index: int, tokenizer: Any | None) -> Prompt:
    """The prompt with token ids. UserError when it has no token, is in no known form, or needs a missing tokenizer."""
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        given = {"prompt": given}
    elif not isinstance(given, Mapping):
        given = {"prompt_token_ids": given}
    forms = [form for form in _FORMS if form in given]
    if len(forms) != 1:
        raise UserError(f"found the keys {sorted(given)}; exactly one of {', '.join(_FORMS)} was wanted.")
    token_ids = _token_ids(forms[0], given[forms[0]], tokenizer)
    if not token_ids:
        raise UserError("the prompt is empty; at least one token was wanted.")
    name = given.get("id", index)
    if not isinstance(name, (str, int)):
        raise UserError(f'"id" is {json.dumps(name)}; a text or a whole number was wanted.')
    return Prompt(index, str(name), token_ids)


def check_prompt(prompt: Prompt, params: SamplingParams, spec: ModelSpec, pool: PoolSize) -> None:
    """UserError, with the numbers, for a prompt that can never run: every limit of the engine in one place."""
    length = len(prompt.token_ids)
    check_tokens(prompt.token_ids, spec)
    if length >= spec.max_positions:
        raise UserError(
            f"the prompt has {length} tokens; the model has {spec.max_positions} positions, one of them for an answer."
        )
    longest = length + min(params.max_new_tokens, spec.max_positions - length) - 1
    if pool.sharding.num_blocks(longest) > pool.num_blocks:
        raise UserError(
            f"the prompt has {length} tokens and may grow to {longest}; the KV pool holds {pool.capacity_tokens}. "
            "Raise kv_cache_gib or decode_context_parallel_size, or lower max_new_tokens."
        )


def check_distinct(prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
    """UserError for prompts of one call that have the same id under the same seed; `seeds`, one per prompt.

    They would share their random numbers: samples of them would not be independent, and no result could be told from
    the other's.
    """
    first: dict[tuple[str, int], int] = {}
    for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        before = first.setdefault((prompt.id, seed), place)
        if before != place:
            raise UserError(
                f'prompts {before} and {place} have the same "id" ({json.dumps(prompt.id)[:40]}) and seed; ids must '
                'differ, they seed the samples. Leave "id" out to have prompts numbered.'
            )


def longest_prompt(params: SamplingParams, spec: ModelSpec, pool: PoolSize) -> int:
    """Tokens of the longest prompt that leaves room for a whole answer; below 1 when none does."""
    most_stored = bisect_right(range(spec.max_positions + 1), pool.num_blocks, key=pool.sharding.num_blocks) - 1
    # The answer's last token is never stored, but it has a position.
    return min(spec.max_positions, most_stored + 1) - params.max_new_tokens


def check_scored_length(num_prompt: int, num_targets: int, spec: ModelSpec, pool: PoolSize) -> None:
    """UserError for a given answer that is too long: its last token needs no position, it is only looked up."""
    length = num_prompt + num_targets - 1
    found = f"the prompt has {num_prompt} tokens and the continuation {num_targets}, which makes {length} to compute"
    if length > spec.max_positions:
        raise UserError(f"{found}; the model has {spec.max_positions} positions.")
    if pool.sharding.num_blocks(length) > pool.num_blocks:
        raise UserError(
            f"{found}; the KV pool holds {pool.capacity_tokens}. Raise kv_cache_gib or decode_context_parallel_size."
        )


def check_tokens(token_ids: Sequence[int], spec: ModelSpec) -> None:
    """UserError for a token that the model has no embedding of."""
    bad = [t for t in token_ids if not 0 <= t < spec.vocab_size]
    if bad:
        raise UserError(f"token id {bad[0]} is outside the vocabulary of {spec.vocab_size} tokens.")


def read_input(
    path: str, tokenizer: Any | None, check: Callable[[Prompt], None] = lambda prompt: None
) -> tuple[list[InputLine], list[str]]:
    """Prompts of a JSON Lines file in file order, and a sentence for each line that is none or that `check` refuses.

    Blank lines are passed over. A bad line still counts in `prompt_index`, so that indices do not depend on how bad
    lines are treated. UserError when the file cannot be read or holds no line at all.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"input {path}: {getattr(error, 'strerror', None) or error}.") from error
    inputs: list[InputLine] = []
    complaints: list[str] = []
    seen: dict[str, int] = {}
    # Not splitlines(): it also breaks at characters like U+2028, which may stand in a JSON text.
    filled = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not filled:
        raise UserError(f"input {path}: the file is empty; one JSON object per line was wanted.")
    for index, (number, line) in enumerate(filled):
        try:
            prompt, answer = _parse_line(line, index, tokenizer)
            first = seen.setdefault(prompt.id, number)
            if first != number:
                raise UserError(f'"id" is the same as in line {first}; ids must differ, they seed the samples.')
            check(prompt)
            inputs.append(InputLine(number, prompt, answer))
        except UserError as error:
            complaints.append(f"input {path}, line {number}: {error}")
    return inputs, complaints


def _parse_line(line: str, index: int, tokenizer: Any | None) -> tuple[Prompt, str | None]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise UserError(f"found {json.dumps(data)[:40]}; an object was wanted.")
    answer = data.get("answer")
    return as_prompt(data, index, tokenizer), answer if isinstance(answer, str) else None


def _token_ids(form: str, value: Any, tokenizer: Any | None) -> tuple[int, ...]:
    if form == "prompt_token_ids":
        if not isinstance(value, Sequence) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
            raise UserError('"prompt_token_ids" must be a list of whole numbers.')
        return tuple(value)
    if tokenizer is None:
        raise UserError(f'"{form}" needs a tokenizer, the model folder has none. Use "prompt_token_ids".')
    if form == "prompt":
        if not isinstance(value, str):
            raise UserError(f'"prompt" is {json.dumps(value)[:40]}; a text was wanted.')
        if not _is_unicode(value):
            raise UserError('"prompt" holds half of a surrogate pair; text that can be written as UTF-8 was wanted.')
        return tuple(tokenizer(value)["input_ids"])
    if not isinstance(value, Sequence) or not value or not all(isinstance(m, Mapping) for m in value):
        raise UserError('"messages" must be a list of objects with "role" and "content".')
    try:
        return tuple(tokenizer.apply_chat_template(list(value), add_generation_prompt=True, return_dict=False))
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise UserError(f'"messages" do not fit the chat template: {error}.') from error


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may spell halves of characters that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
