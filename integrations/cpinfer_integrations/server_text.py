"""Texts of a server: prompts to token ids, tokens to text as they come, logprobs in OpenAI's shapes, tool calls."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

from tokenizers.decoders import DecodeStream

from cpinfer.engine.chats import chat_token_ids
from cpinfer.engine.prompts import as_prompt
from cpinfer.engine.request import RolloutResult
from cpinfer.models.response_parsing import response_parser
from cpinfer_integrations.server_errors import ApiError

Top = Sequence[tuple[int, float]]
# The names that response templates have for what a model thinks.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Texts up to this length are read on the event loop: to hand them to another thread takes longer than to read them.
_SHORT_CHARS = 2_000


class ServerTokenizer:
    """A tokenizer on copies of its own: one may not be used by two threads at a time, and the engine has its own.

    Long prompts are read in one thread beside the event loop, so that they keep nobody waiting for tokens.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._beside, self._here = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._shown = lru_cache(2**16)(self._show)

    @property
    def has_words(self) -> bool:
        """Whether there is a tokenizer."""
        return self._here is not None

    async def read_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text. UserError for one that is none."""
        if len(text) <= _SHORT_CHARS:
            return _token_ids(self._here, text, add_special_tokens)
        return await self._in_thread(partial(_token_ids, self._beside, text, add_special_tokens))

    async def read_chat(self, messages: Any, tools: Any, template_kwargs: Any) -> tuple[int, ...]:
        """Token ids of a chat by the model's template. UserError as `chat_token_ids` has it."""
        if not self.has_words:
            raise ApiError(400, "chats need a tokenizer, the model's folder has none. Ask with token ids.")
        plain = _with_arguments_as_objects(messages)
        return await self._in_thread(partial(chat_token_ids, plain, self._beside, tools, template_kwargs))

    async def _in_thread(self, read: Any) -> tuple[int, ...]:
        token_ids: tuple[int, ...] = await asyncio.get_running_loop().run_in_executor(self._reading, read)
        return token_ids

    def close(self) -> None:
        """End the thread that reads prompts."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    def text(self, token_ids: Sequence[int]) -> str:
        """Of all tokens, special ones included; empty without a tokenizer."""
        return "" if self._here is None else str(self._here.decode(list(token_ids)))

    def stream(self, stop: Sequence[str]) -> TextStream:
        """A text that grows, of an answer that may end at `stop`."""
        return TextStream(self._here, max(map(len, stop), default=1) - 1)

    def message_stream(self, prompt_ids: Sequence[int], tools: Any) -> MessageStream | None:
        """A message that grows, of an answer that may call tools; None where no response template says how."""
        backend = getattr(self._here, "backend_tokenizer", None)
        parser = None if backend is None else response_parser(self._here, prompt_ids, tools)
        return None if parser is None else MessageStream(self._here, parser)

    def parsed(self, prompt_ids: Sequence[int], result: RolloutResult, tools: Any) -> dict[str, Any] | None:
        """An answer as the message that the model's response template makes of it; None where nothing is called."""
        if getattr(self._here, "response_template", None) is None or not tools:
            return None
        assert self._here is not None, "what has a template is there"
        try:
            found = self._here.parse_response(list(result.token_ids), prefix=list(prompt_ids), tools=tools)
            return _message(found)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # it is no call, or no tool
            return None

    def completion_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top], offset: int = 0
    ) -> dict[str, Any]:
        """Logprobs as `/v1/completions` has them; `offset` is where the first token's text begins."""
        tokens = [self._shown(token) for token in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": list(logprobs),
            "top_logprobs": [
                self._top_by_text(token, logprob, top)
                for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
            ]
            if tops
            else None,
            "text_offset": offsets,
        }

    def chat_logprobs(self, token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]) -> dict[str, Any]:
        """Logprobs as `/v1/chat/completions` has them."""
        tops = tops or [()] * len(token_ids)
        return {
            "content": [
                {**self._logprob(token, logprob), "top_logprobs": [self._logprob(*likely) for likely in top]}
                for token, logprob, top in zip(token_ids, logprobs, tops, strict=True)
            ]
        }

    def _logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._shown(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}

    def _top_by_text(self, token: str, logprob: float | None, top: Top) -> dict[str, float] | None:
        """The likeliest by their texts, the likelier where two have one, and the token itself, as OpenAI has it."""
        if logprob is None:
            return None
        found: dict[str, float] = {}
        for likely, value in top:
            found.setdefault(self._shown(likely), value)
        found.setdefault(token, logprob)
        return found

    def _show(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._here is None else str(self._here.decode([token_id]))


class TextStream:
    """The text of an answer as its tokens come. What may yet be cut off, `num_held` characters, is told at the end."""

    def __init__(self, tokenizer: Any | None, num_held: int) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = DecodeStream(skip_special_tokens=True)
        self._num_held = num_held
        self._text = ""
        self._num_told = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens make certain; none without a tokenizer of the Rust kind."""
        if self._backend is None:
            return ""
        try:
            for token in token_ids:
                self._text += self._decode.step(self._backend, token) or ""
        except Exception:  # tokens whose text is not that of the tokens before with more behind it
            self._backend = None
            return ""
        return self._tell(max(self._num_told, len(self._text) - self._num_held))

    def end(self, text: str | None) -> str:
        """What is left of the whole text."""
        self._text = text or ""
        return self._tell(len(self._text))

    def _tell(self, end: int) -> str:
        told, self._num_told = self._text[self._num_told : end], end
        return told


class MessageStream:
    """The message of an answer as its tokens come, by a response template: text at once, a call when it is whole."""

    def __init__(self, tokenizer: Any, parser: Any) -> None:
        self._tokenizer = tokenizer
        self._parser = parser
        self._decode = DecodeStream(skip_special_tokens=False)
        self._untold: list[int] = []  # of text, or of a call that is not whole
        self.num_calls = 0

    def feed(self, token_ids: Sequence[int], *, is_last: bool) -> dict[str, Any]:
        """What these tokens add to the message, as a `delta` of OpenAI's. What cannot be read is text, at the end."""
        self._untold += token_ids
        delta: dict[str, Any] = {}
        try:
            for event in self._events(token_ids, is_last=is_last):
                self._take(event, delta)
        except Exception:  # it is no call, or no tool; or tokens whose text changes that of those before
            self._parser = None
        if self._parser is None and is_last:
            self._add(delta, "content", str(self._tokenizer.decode(self._untold, skip_special_tokens=True)))
        return delta

    def _events(self, token_ids: Sequence[int], *, is_last: bool) -> Iterator[Mapping[str, Any]]:
        for token in token_ids if self._parser is not None else ():
            yield from self._parser.feed(self._decode.step(self._tokenizer.backend_tokenizer, token) or "")
        if is_last and self._parser is not None:
            yield from self._parser.finalize()[1]

    def _take(self, event: Mapping[str, Any], delta: dict[str, Any]) -> None:
        name = "reasoning_content" if event["field"] in _THOUGHTS else event["field"]
        if event["type"] == "region_chunk" and not event["dirty"] and name in ("content", "reasoning_content"):
            self._add(delta, name, event["text"])
        elif event["type"] == "region_close" and name == "tool_calls":
            calls = event["value"] if isinstance(event["value"], list) else [event["value"]]
            found = [{"index": self.num_calls + i, **_call(call)} for i, call in enumerate(calls)]
            self.num_calls += len(found)
            delta["tool_calls"] = [*delta.get("tool_calls", ()), *found]
            self._untold = []  # also the token behind a call, where it took that one to see the call's end

    def _add(self, delta: dict[str, Any], name: str, text: str) -> None:
        delta[name] = delta.get(name, "") + text
        self._untold = []


def _token_ids(tokenizer: Any | None, text: str, add_special_tokens: bool) -> tuple[int, ...]:
    token_ids = as_prompt(text, 0, tokenizer).token_ids
    if add_special_tokens or tokenizer is None:
        return token_ids
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_arguments_as_objects(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool calls have their arguments as templates read them: OpenAI has them as JSON in a text."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list)
        else dict(message)
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _message(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """A parsed message in OpenAI's shape; None where it calls nothing."""
    calls = [_call(call) for call in found.get("tool_calls") or ()]
    if not calls:
        return None
    message = {"role": "assistant", "content": found.get("content") or None, "tool_calls": calls}
    thought = next((found[name] for name in _THOUGHTS if found.get(name)), None)
    return {**message, "reasoning_content": thought} if thought else message


def _call(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """A call as OpenAI has it: with an id, and its arguments as JSON in a text."""
    name, arguments = parsed["function"]["name"], parsed["function"]["arguments"]
    function = {"name": str(name), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
