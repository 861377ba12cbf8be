"""lm-eval's requests: their arguments as sampling parameters, their answers as texts, their batches, whose an error is.

The tasks that lm-eval 0.4.13 ships use `until`, `do_sample`, `temperature`, `top_p`, `max_gen_toks` (`max_new_tokens`)
and `num_beams`; users add what `generate` of Transformers takes. What is known here means what it means to `hf`,
anything else is refused by name.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.errors import UserError, quoted
from cpinfer.packages import named

try:
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

# What shapes a sample; under greedy decoding only the penalty counts.
_SHAPES = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
_OTHERS = ("do_sample", "until", "max_gen_toks", "min_new_tokens", "eos_token_id")
# Generation arguments that ask for nothing when they have this value.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "length_penalty": 1.0}


def sampling_of(gen_kwargs: Mapping[str, Any], eos: str, max_gen_toks: int, model: SamplingParams) -> SamplingParams:
    """The engine's parameters for a request's generation arguments; `stop` are the texts that end its answer.

    Args:
        gen_kwargs: what the task and the command line say.
        eos: the text of the tokenizer's EOS, which ends every answer.
        max_gen_toks: tokens of an answer whose arguments set no limit.
        model: what holds where the arguments say nothing of sampling; its temperature and its limit do not.

    Raises:
        UserError: for an argument that is not known or has no such value.
    """
    try:
        kwargs = normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation arguments {quoted(gen_kwargs, limit=200)} cannot be read: {error}.") from error
    known = (*_SHAPES, *_OTHERS)
    unknown = [key for key, value in kwargs.items() if key not in known and _NEUTRAL.get(key) != value]
    if unknown:
        raise UserError(f"generation arguments {unknown} are not known; known are {', '.join(known)}.")
    until = [text for text in kwargs["until"] if text is not None]
    if not all(isinstance(text, str) and text for text in until):
        raise UserError(
            f'"until" is {quoted(until)}; texts were wanted, and no empty one: `hf` ends answers there after one token.'
        )
    longest = kwargs["max_gen_toks"]
    shortest = _number("min_new_tokens", _given(kwargs, "min_new_tokens", model), int)
    return SamplingParams(
        **_shape(kwargs, model),
        max_new_tokens=longest,
        stop=tuple(dict.fromkeys((*handle_stop_sequences(until, eos=eos), *model.stop))),
        min_new_tokens=min(shortest, longest),  # more than all tokens is as good as all to `generate`
        **_ends(kwargs.get("eos_token_id")),
    )


def _shape(kwargs: Mapping[str, Any], model: SamplingParams) -> dict[str, Any]:
    """What shapes the distribution of an answer's tokens, by key of `SamplingParams`."""
    if kwargs["do_sample"] not in (True, False):
        raise UserError(f'"do_sample" is {quoted(kwargs["do_sample"])}; true or false was wanted.')
    kwargs = {"temperature": 0, **kwargs}
    shape = {key: _number(key, _given(kwargs, key, model), kind) for key, kind in _SHAPES.items()}
    if not kwargs["do_sample"]:
        return {"repetition_penalty": shape["repetition_penalty"], "temperature": 0}
    if not shape["temperature"]:
        raise UserError(
            '"do_sample" is true and "temperature" 0, which it is where none is given: `hf` refuses that too. Give one '
            "above 0, or do_sample: false."
        )
    return shape


def answer_text(
    token_ids: Sequence[int], params: SamplingParams, tokenizer: Any, think_end_token: str | int | None
) -> str:
    """The text that `hf` makes of an answer's tokens: up to the first stop string, and behind the last end of thinking.

    To `hf` a minimum of tokens holds back no stop string, to the engine it does: what came behind one is cut off here.
    """
    kept = list(token_ids)
    if params.min_new_tokens:
        last = bisect_left(range(len(kept)), True, key=lambda i: _has_stop(kept[: i + 1], params, tokenizer))
        kept = kept[: last + 1]
    if isinstance(think_end_token, int):
        end = next((i for i in reversed(range(len(kept))) if kept[i] == think_end_token), -1)
        text = tokenizer.decode(kept[end + 1 :], skip_special_tokens=True).lstrip()
        think_end_token = None
    else:
        text = tokenizer.decode(kept, skip_special_tokens=True)
    return str(postprocess_generated_text(text, list(params.stop), think_end_token))


@contextmanager
def by_document(requests: Sequence[Any]) -> Iterator[None]:
    """In the block a UserError about one of `requests`, by its place, says of which task and document it is."""
    try:
        yield
    except UserError as error:
        if error.place is None:
            raise
        request = requests[error.place]
        raise type(error)(f"task {request.task_name}, document {request.doc_id}: {error.reason}") from error


def prompt_id(token_ids: Sequence[int], params: SamplingParams) -> str:
    """The id of a prompt, which seeds its samples: the same in any order and company of requests."""
    # Without defaults: a key that is new one day shall not move the samples of all who do not use it.
    said = [(key.name, getattr(params, key.name)) for key in fields(params) if getattr(params, key.name) != key.default]
    return hashlib.sha256(repr((token_ids, said)).encode()).hexdigest()[:16]


def in_batches(
    order: Sequence[int], pairs: Sequence[tuple[list[int], list[int]]], capacity_tokens: int
) -> Iterator[list[int]]:
    """`order` in runs that share no context and, where more than one context is in them, fit `capacity_tokens`."""
    batch: list[int] = []
    tokens = 0
    for place, i in enumerate(order):
        context, continuation = pairs[i]
        is_new = place == 0 or pairs[order[place - 1]][0] != context
        cost = len(continuation) + (len(context) if is_new else 0)
        if batch and is_new and tokens + cost > capacity_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += cost
    if batch:
        yield batch


def _has_stop(token_ids: Sequence[int], params: SamplingParams, tokenizer: Any) -> bool:
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return any(stop in text for stop in params.stop)


def _ends(eos_token_id: Any) -> dict[str, Any]:
    """The tokens that end an answer: the model's own, or in their place those of an argument, one or a list."""
    if eos_token_id is None:
        return {}
    ids = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(f'"eos_token_id" is {quoted(eos_token_id)}; a token id or a list of them was wanted.')
    return {"ignore_eos": True, "stop_token_ids": tuple(ids)}


def _given(kwargs: Mapping[str, Any], key: str, model: SamplingParams) -> Any:
    return getattr(model, key) if kwargs.get(key) is None else kwargs[key]


def _number(key: str, value: Any, kind: type[int] | type[float]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f'"{key}" is {quoted(value)}; a number was wanted.') from error
