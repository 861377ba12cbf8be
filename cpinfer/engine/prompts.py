"""Prompts: what a user may write, turned into token ids, and whether they can ever run."""

from __future__ import annotations

import dataclasses
import numbers
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.engine.chats import chat_token_ids
from cpinfer.engine.request import OwnSampling, Prompt
from cpinfer.errors import UserError, quoted, unknown_word
from cpinfer.layout.capacity import PoolSize
from cpinfer.models.spec import ModelSpec
from cpinfer.schema import conform_keys
from cpinfer.strict_json import is_unicode, parse_json, read_text

PromptLike = Prompt | str | Sequence[int] | Mapping[str, Any]
# One prompt, or many: what `as_prompts` takes.
PromptsLike = PromptLike | Iterable[PromptLike]
_FORMS = ("prompt", "prompt_token_ids", "messages")
# What a line of an input file, or an object that is given as a prompt, may say; docs/reference/config.md prints it.
LINE_KEYS: Mapping[str, str] = {
    "prompt": "a text; the tokenizer adds what it always adds",
    "prompt_token_ids": "token ids, taken as they are",
    "messages": "a chat for the model's chat template: objects with `role` and `content`, a text or a list of text "
    "parts; a final assistant message is continued",
    "tools": "JSON schemas of tools, for the chat template; only with `messages`",
    "chat_template_kwargs": 'what else the chat template reads, as `{"enable_thinking": false}`; only with `messages`',
    "sampling": "keys of `sampling` that this prompt has of its own; they win over the config's, and over the call's",
    "id": "a text or a whole number that names the prompt and seeds its samples; default: its place, from 0",
    "answer": "a text that the answer is to begin with; the summary counts how many do",
}
_FOR_TEMPLATES = ("tools", "chat_template_kwargs")
_SAMPLING_KEYS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True)
class InputLine:
    """A prompt of an input file: its line number there, and the answer the file expects, if it names one."""

    number: int
    prompt: Prompt
    answer: str | None


def as_prompts(given: Any) -> list[PromptLike]:
    """A list of prompts from what a caller gave: many prompts of any form, or one that nobody could take for many.

    One prompt is a text, a `Prompt`, an object with the keys of an input line, token ids (a list or a 1-d array) or a
    chat (a list of messages, each an object with a "role"). Several are an iterable of these, or a 2-d array. UserError
    for anything else.

    >>> as_prompts("hi"), as_prompts([1, 2]), as_prompts([[1, 2], "hi"]), as_prompts([])
    (['hi'], [(1, 2)], [(1, 2), 'hi'], [])
    >>> as_prompts([{"role": "user", "content": "hi"}])
    [{'messages': [{'role': 'user', 'content': 'hi'}]}]
    """
    given = _plain(given)
    if isinstance(given, (str, Prompt, Mapping)):
        return [given]
    if isinstance(given, (bytes, bytearray, set, frozenset)) or not isinstance(given, Iterable):
        raise UserError(f"found {_named(given)}; a prompt or a list of prompts was wanted.")
    items = list(given)
    if items and (_ints(items) or all(map(_is_message, items))):
        return [_one_prompt(items, "the prompt")]
    return [_one_prompt(_plain(item), f"prompt {i}") for i, item in enumerate(items)]


def as_token_lists(given: Any, tokenizer: Any | None) -> list[tuple[int, ...]]:
    """The token ids of each prompt, in any form that `as_prompts` takes.

    UserError for an id, or sampling of its own: here neither is kept.
    """
    prompts = as_prompts(given)
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, Prompt) or (isinstance(prompt, Mapping) and "id" in prompt):
            raise UserError(f"prompt {index} has an id; prompts that are pooled are named by their pool. Leave it out.")
    lists = []
    for index, prompt in enumerate(prompts):
        with naming("prompt", index):
            lists.append(refuse_sampling(as_prompt(prompt, index, tokenizer)).token_ids)
        if not all(-(2**63) <= token < 2**63 for token in lists[-1]):  # they travel as such numbers
            raise UserError(f"prompt {index} is {quoted(lists[-1])}, which no vocabulary holds.")
    return lists


@contextmanager
def naming(what: str, index: int) -> Iterator[None]:
    """In the block a UserError says of which of many things it speaks, by their number in the call: its `place`."""
    try:
        yield
    except UserError as error:
        placed = type(error)(f"{what} {index}: {error}")
        placed.place = index
        raise placed from error


def as_pairs(given: Any) -> list[tuple[PromptLike, tuple[int, ...]]]:
    """Pairs of a prompt and the token ids that continue it, from a list of pairs or from one. UserError otherwise.

    >>> as_pairs(("hi", [1, 2])), as_pairs([("hi", [1]), ([3], [4])])
    ([('hi', (1, 2))], [('hi', (1,)), ((3,), (4,))])
    """
    if isinstance(given, (str, bytes, Prompt, Mapping, set, frozenset)) or not isinstance(given, Iterable):
        raise UserError(f"found {_named(given)}; pairs of a prompt and token ids were wanted.")
    items = list(given)
    if len(items) == 2 and not all(map(_is_pair, items)) and _is_pair(items):
        items = [tuple(items)]
    return [_pair(index, item) for index, item in enumerate(items)]


def as_sampling(given: Any, num_prompts: int) -> list[SamplingParams]:
    """The sampling parameters of each prompt: one for all, the defaults for None, or one each. UserError otherwise."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * num_prompts
    if not isinstance(given, (list, tuple)) or not all(isinstance(params, SamplingParams) for params in given):
        raise UserError(f"found {_named(given)} for sampling; SamplingParams, or one for each prompt, were wanted.")
    if len(given) != num_prompts:
        raise UserError(f"{len(given)} sampling parameters for {num_prompts} prompts; one each was wanted.")
    return list(given)


def as_prompt(given: PromptLike, index: int, tokenizer: Any | None, default_id: str | None = None) -> Prompt:
    """The prompt with token ids. UserError when it has no token, is in no known form, or needs a missing tokenizer.

    One without an id gets `default_id`, or its index for one.
    """
    if isinstance(given, Prompt):
        token_ids = _token_ids("prompt_token_ids", given.token_ids, None)
        sampling = _own_sampling(given.sampling)
        is_plain = token_ids is given.token_ids and sampling == given.sampling
        return _with_tokens(given if is_plain else dataclasses.replace(given, token_ids=token_ids, sampling=sampling))
    if isinstance(given, str):
        given = {"prompt": given}
    elif not isinstance(given, Mapping):
        given = {"prompt_token_ids": given}
    form = _form(given)
    if form == "messages" and tokenizer is not None:
        token_ids = chat_token_ids(given[form], tokenizer, *(given.get(key) for key in _FOR_TEMPLATES))
    else:
        token_ids = _token_ids(form, given[form], tokenizer)
    sampling = _own_sampling(given.get("sampling"))
    name = given.get("id", index if default_id is None else default_id)
    return _with_tokens(Prompt(index, _id_of(name), token_ids, sampling))


def as_turn(given: Any) -> tuple[int, ...]:
    """The token ids of a turn of a session, which may be none. UserError for anything else."""
    tokens = _ints(given)
    if tokens is None:
        raise UserError(
            f"found {_named(given)} for a turn; a list of token ids was wanted, to stand behind the session's own. "
            "Render a chat's new messages, and leave out what begins a text."
        )
    return tokens


def sampling_of(prompt: Prompt, params: SamplingParams) -> SamplingParams:
    """The parameters that a prompt of `as_prompt` is sampled with: what it says itself, over those of the call.

    UserError for what does not go together.
    """
    if not prompt.sampling:
        return params
    try:
        return dataclasses.replace(params, **dict(prompt.sampling))
    except UserError as error:
        raise type(error)(f'"sampling": {error}') from error


def refuse_sampling(prompt: Prompt) -> Prompt:
    """The prompt. UserError where it has sampling of its own, and what it is for knows only that of the call."""
    if prompt.sampling:
        raise UserError(
            '"sampling" of a prompt\'s own is for generate, stream and rollout; here all are sampled alike, or nothing '
            "is sampled. Leave it out."
        )
    return prompt


def check_prompt(prompt: Prompt, params: SamplingParams, spec: ModelSpec, pool: PoolSize) -> None:
    """UserError, with the numbers, for a prompt that can never run: every limit of the engine in one place."""
    check_sampling(params, spec)
    check_tokens(prompt.token_ids, spec)
    check_length(len(prompt.token_ids), params, spec, pool)


def check_length(length: int, params: SamplingParams, spec: ModelSpec, pool: PoolSize) -> None:
    """UserError, with the numbers, for a prompt of `length` tokens that leaves an answer no room."""
    if length >= spec.max_positions:
        raise UserError(
            f"the prompt has {length} tokens; the model has {spec.max_positions} positions, one of them for an answer. "
            "Shorten it, or raise max_model_len."
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
                f'prompts {before} and {place} have the same "id" ({quoted(prompt.id)}) and seed; ids must '
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
        raise UserError(f"{found}; the model has {spec.max_positions} positions. Shorten it, or raise max_model_len.")
    if pool.sharding.num_blocks(length) > pool.num_blocks:
        raise UserError(
            f"{found}; the KV pool holds {pool.capacity_tokens}. Raise kv_cache_gib or decode_context_parallel_size."
        )


def check_tokens(token_ids: Sequence[int], spec: ModelSpec) -> None:
    """UserError for a token that the model has no embedding of."""
    bad = [t for t in token_ids if not 0 <= t < spec.vocab_size]
    if bad:
        raise UserError(f"token id {quoted(bad[0])} is outside the vocabulary of {spec.vocab_size} tokens.")


def check_sampling(params: SamplingParams, spec: ModelSpec) -> None:
    """UserError for tokens that the model does not have, and for an answer that no token may begin."""
    named = {"stop_token_ids": params.stop_token_ids, "logit_bias": tuple(token for token, _ in params.logit_bias)}
    for key, tokens in named.items():
        bad = [token for token in tokens if token >= spec.vocab_size]
        if bad:
            raise UserError(f'"{key}" has token id {bad[0]}; the vocabulary has {spec.vocab_size} tokens.')
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else spec.eos_token_ids)}
    if params.min_new_tokens > 0 and len(ends) == spec.vocab_size:
        raise UserError('"stop_token_ids" are all tokens there are; with "min_new_tokens" none is left to begin with.')
    if params.routed_experts and spec.experts_per_token is None:
        raise UserError(
            f'"routed_experts" asks which experts tokens go through; model_type "{spec.family}" has none. Leave it out.'
        )


def read_input(
    path: str,
    tokenizer: Any | None,
    check: Callable[[Prompt], None] = lambda prompt: None,
    *,
    keep_other_keys: bool = False,
    own_sampling: bool = False,
) -> tuple[list[InputLine], list[str]]:
    """Prompts of a JSON Lines file in file order, and a sentence for each line that is none or that `check` refuses.

    Blank lines are passed over. A bad line still counts in `prompt_index`, so that indices do not depend on how bad
    lines are treated. With `keep_other_keys` a line may say more, of any kind, to someone else (a reward), but nothing
    to a chat template, as that someone renders chats too. Only with `own_sampling` may it say how it is sampled.
    UserError when the file cannot be read or holds no line at all.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # also what is no UTF-8, or no path
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
            prompt, answer = _parse_line(line, index, tokenizer, keep_other_keys)
            first = seen.setdefault(prompt.id, number)
            if first != number:
                raise UserError(
                    f'"id" is the same as in line {first} ({quoted(prompt.id)}); ids must differ, they seed the '
                    "samples. A line without one is named by its place, from 0."
                )
            if not own_sampling:
                refuse_sampling(prompt)
            check(prompt)
            inputs.append(InputLine(number, prompt, answer))
        except UserError as error:
            complaints.append(f"input {path}, line {number}: {error}")
    return inputs, complaints


def _parse_line(line: str, index: int, tokenizer: Any | None, keep_other_keys: bool) -> tuple[Prompt, str | None]:
    data = parse_json(line)
    if not isinstance(data, dict):
        raise UserError(f"found {quoted(data)}; an object was wanted.")
    answer = data.get("answer")
    if keep_other_keys:
        for key in _FOR_TEMPLATES:
            if data.get(key) is not None:
                raise UserError(f'"{key}" is for rollouts; a trainer renders its chats itself. Leave it out.')
        data, answer = {key: data[key] for key in LINE_KEYS if key in data}, None
    elif answer is not None and (not isinstance(answer, str) or not is_unicode(answer)):
        raise UserError(f'"answer" is {quoted(answer)}; a text was wanted.')
    return as_prompt(data, index, tokenizer), answer


def _one_prompt(item: Any, where: str) -> PromptLike:
    """A prompt from one item of many, plain already. UserError when it is none."""
    if isinstance(item, (str, Prompt, Mapping)):
        return item
    tokens = _ints(item)
    if tokens is not None:
        return tokens
    if isinstance(item, Sequence) and all(map(_is_message, item)):
        return {"messages": item}
    raise UserError(f"{where} is {_named(item)}; a text, a list of token ids, a chat or an object was wanted.")


def _pair(index: int, item: Any) -> tuple[PromptLike, tuple[int, ...]]:
    if not _is_pair(item):
        raise UserError(f"pair {index} is {_named(item)}; a prompt and the token ids that continue it were wanted.")
    prompt, continuation = item
    tokens = _ints(continuation)
    if tokens is None:
        raise UserError(f"the continuation of pair {index} is {_named(continuation)}; a list of token ids was wanted.")
    return _one_prompt(_plain(prompt), f"the prompt of pair {index}"), tokens


def _is_pair(item: Any) -> bool:
    """Whether something can be a prompt with its continuation, of whatever kind that is."""
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return False
    try:
        _one_prompt(_plain(item[0]), "")
    except UserError:
        return False
    return True


def _is_token(item: Any) -> bool:
    return isinstance(item, numbers.Integral) and not isinstance(item, bool)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item


def _plain(value: Any) -> Any:
    """What numpy and torch hold, as Python's numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _ints(value: Any) -> tuple[int, ...] | None:
    """Whole numbers in a list or an array as a tuple of Python's; None when it holds, or is, anything else."""
    value = _plain(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        return None
    if set(map(type, value)) <= {int}:  # as a rule; prompts are long
        return tuple(value)
    plain = [_plain(t) for t in value]
    return tuple(map(int, plain)) if all(map(_is_token, plain)) else None


def _named(value: Any) -> str:
    """A value that is no prompt, by its type and its beginning."""
    return f"{quoted(value)} (a {type(value).__name__})"


def _with_tokens(prompt: Prompt) -> Prompt:
    if not prompt.token_ids:
        raise UserError("the prompt is empty; at least one token was wanted.")
    return prompt


def _form(given: Mapping[Any, Any]) -> str:
    """Which form a prompt has that is given as an object. UserError for none, for several, and for unknown keys."""
    forms = [form for form in _FORMS if form in given]
    if len(forms) != 1:
        keys = quoted(sorted(map(str, given)), limit=120)
        found = f"found the keys {keys}; exactly one of {', '.join(_FORMS)} was wanted."
        if "input_ids" in given and not forms:
            found += ' Of what a tokenizer gives, hand over its "input_ids", without padding.'
        raise UserError(found)
    for key in given:
        if key in _SAMPLING_KEYS:
            raise UserError(f'"{key}" says how tokens are chosen: put it under "sampling".')
        if key not in LINE_KEYS:
            raise UserError(unknown_word("key", key, LINE_KEYS))
        if key in _FOR_TEMPLATES and forms != ["messages"] and given[key] is not None:
            raise UserError(f'"{key}" is for the chat template, which only "messages" pass; here is "{forms[0]}".')
    return forms[0]


def _own_sampling(given: Any) -> OwnSampling | None:
    """What a prompt says of its sampling, as pairs in the order of their keys. UserError for what no schema allows.

    Values that have to go together are looked at when those of the call are known.
    """
    if isinstance(given, tuple) and all(map(_is_named, given)):  # as a Prompt holds it
        given = dict(given)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f'"sampling" is {quoted(given)}; an object with keys of SamplingParams was wanted.')
    return tuple(sorted(conform_keys(SamplingParams, given, "sampling.").items())) or None


def _is_named(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)


def _id_of(name: Any) -> str:
    """The id of a prompt as text. UserError when it is no text that a file could hold, and no whole number."""
    name = _plain(name)
    is_number = _is_token(name) and abs(name) < 2**63
    if not is_number and not (isinstance(name, str) and is_unicode(name)):
        raise UserError(f'"id" is {quoted(name)}; a text or a whole number was wanted.')
    return str(name)


def _token_ids(form: str, value: Any, tokenizer: Any | None) -> tuple[int, ...]:
    if form == "prompt_token_ids":
        tokens = _ints(value)
        if tokens is None:
            raise UserError(f'"prompt_token_ids" is {quoted(value)}; it must be a list of whole numbers.')
        return tokens
    if tokenizer is None:
        raise UserError(f'"{form}" needs a tokenizer, the model folder has none. Use "prompt_token_ids".')
    if not isinstance(value, str):
        raise UserError(f'"prompt" is {quoted(value)}; a text was wanted.')
    if not is_unicode(value):
        raise UserError('"prompt" holds half of a surrogate pair; text that can be written as UTF-8 was wanted.')
    return tuple(tokenizer(value)["input_ids"])
