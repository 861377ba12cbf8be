"""Answers to completions and chats in OpenAI's shapes, whole and as streams of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpinfer.engine.open_requests import RequestOutput
from cpinfer.engine.request import RolloutResult
from cpinfer_integrations.server_bridge import Answers
from cpinfer_integrations.server_errors import ApiError, log_fault
from cpinfer_integrations.server_schemas import ChatRequest, CompletionRequest, SampledRequest
from cpinfer_integrations.server_text import MessageStream, ServerTokenizer, TextStream

Json = dict[str, Any]


@dataclass(eq=False)
class _Growing:
    """A choice of a stream: its text so far, and how many characters its tokens have made."""

    text: TextStream
    message: MessageStream | None = None  # where it may call tools
    offset: int = 0
    is_first: bool = True


@dataclass(eq=False)
class Reply(ABC):
    """What is answered to what a client has `asked`, with `prompts` as token ids and `n` samples of each."""

    asked: SampledRequest
    model: str
    tokenizer: ServerTokenizer
    prompts: Sequence[Sequence[int]]
    n: int
    stop: Sequence[str]
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix = ""
    whole_object = ""
    chunk_object = ""

    @abstractmethod
    def choice(self, place: int, result: RolloutResult) -> Json:
        """A sample of the prompt at `place`, whole: all but its index and what all choices have."""

    @abstractmethod
    def chunk(self, place: int, output: RequestOutput, growing: _Growing) -> Json:
        """What is new of a sample, likewise."""

    def begin(self, place: int) -> _Growing:
        """A choice of the prompt at `place` that has nothing yet."""
        return _Growing(self.tokenizer.stream(self.stop))

    async def whole(self, answers: Answers) -> Json:
        """All of it, when the last sample has ended."""
        results: dict[int, tuple[int, RolloutResult]] = {}
        async for found in answers.outputs():
            for place, output in found:
                assert output.result is not None, "it is the last of its sample"
                results[self._index(place, output)] = place, output.result
        choices = [
            {"index": index, **self.choice(place, result), **self._of_result(result), **self._ids(place, result)}
            for index, (place, result) in sorted(results.items())
        ]
        version = max(result.weights_version for _, result in results.values())
        usage = self._usage(sum(len(result.token_ids) for _, result in results.values()))
        return {**self._head(self.whole_object), "choices": choices, "usage": usage, "weights_version": version}

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        """The same as server-sent events, one for every output. An error is the last of them."""
        growing: dict[int, _Growing] = {}
        num_tokens = 0
        try:
            async for found in answers.outputs():
                yield b"".join([self._event(place, output, growing) for place, output in found])
                num_tokens += sum(len(output.tokens) for _, output in found)
            if self.asked.includes_usage:
                yield _event({**self._head(self.chunk_object), "choices": [], "usage": self._usage(num_tokens)})
        except ApiError as error:
            yield _event({"error": error.error})
            return
        except Exception as error:
            log_fault(error)
            yield _event({"error": ApiError.of_fault(error).error})
            return
        yield b"data: [DONE]\n\n"

    def _event(self, place: int, output: RequestOutput, growing: dict[int, _Growing]) -> bytes:
        index = self._index(place, output)
        if index not in growing:
            growing[index] = self.begin(place)
        said = {"index": index, "finish_reason": output.finish_reason, **self.chunk(place, output, growing[index])}
        if self.asked.return_token_ids:
            said |= {"token_ids": output.token_ids}
            said |= {"prompt_token_ids": self.prompts[place]} if growing[index].is_first else {}
        if output.result is not None:
            said |= self._of_result(output.result)
        growing[index].is_first = False
        head = self._head(self.chunk_object)
        return _event({**head, "choices": [said], "weights_version": output.weights_version})

    def _grown(self, output: RequestOutput, growing: _Growing) -> str:
        """The text that an output makes certain: of the last one also what a stop string might have cut off."""
        return growing.text.feed(output.token_ids) if output.result is None else growing.text.end(output.result.text)

    def _index(self, place: int, output: RequestOutput) -> int:
        return place * self.n + output.sample_index

    def _head(self, kind: str) -> Json:
        return {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _usage(self, num_tokens: int) -> Json:
        num_prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
        }

    def _of_result(self, result: RolloutResult) -> Json:
        """Which weights have sampled how many of its tokens, one pair for each version in turn."""
        return {"weights_versions": result.weights_versions or [(result.weights_version, len(result.token_ids))]}

    def _ids(self, place: int, result: RolloutResult) -> Json:
        if not self.asked.return_token_ids:
            return {}
        return {"token_ids": result.token_ids, "prompt_token_ids": self.prompts[place]}


@dataclass(eq=False)
class Completion(Reply):
    """An answer of `/v1/completions`. `texts` of the prompts, where they are to be repeated."""

    asked: CompletionRequest
    texts: Sequence[str] = ()

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, place: int, result: RolloutResult) -> Json:
        logprobs = None
        before = self.texts[place] if self.asked.echo else ""
        if self.asked.logprobs is not None:
            tokens, tops = result.token_ids, result.top_logprobs or ()
            values: Sequence[float | None] = result.logprobs
            if self.asked.echo:
                tokens, values = (*result.prompt_token_ids, *tokens), (*(result.prompt_logprobs or ()), *values)
                tops = (*(result.prompt_top_logprobs or ()), *tops)
            logprobs = self.tokenizer.completion_logprobs(tokens, values, tops)
        text = before + (result.text or "")
        return {"text": text, "logprobs": logprobs, "finish_reason": result.finish_reason}

    def chunk(self, place: int, output: RequestOutput, growing: _Growing) -> Json:
        before = self.texts[place] if self.asked.echo and growing.is_first else ""
        text = self._grown(output, growing)
        logprobs = None
        if self.asked.logprobs is not None:
            tops = [token.top for token in output.tokens] if self.asked.logprobs else ()
            logprobs = self.tokenizer.completion_logprobs(output.token_ids, output.logprobs, tops, growing.offset)
            growing.offset += sum(map(len, logprobs["tokens"]))
        return {"text": before + text, "logprobs": logprobs}


@dataclass(eq=False)
class Chat(Reply):
    """An answer of `/v1/chat/completions`. With tools and stop strings, a stream tells all of it at the end."""

    asked: ChatRequest

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, place: int, result: RolloutResult) -> Json:
        message = self._parsed(place, result)
        logprobs = None
        if self.asked.logprobs:
            tops = result.top_logprobs or ()
            logprobs = self.tokenizer.chat_logprobs(result.token_ids, result.logprobs, tops)
        return {
            "message": message or {"role": "assistant", "content": result.text or ""},
            "logprobs": logprobs,
            "finish_reason": result.finish_reason if message is None else "tool_calls",
        }

    def begin(self, place: int) -> _Growing:
        growing, tools = super().begin(place), self.asked.shown_tools
        if tools and not self.stop:  # which would have to be cut off
            growing.message = self.tokenizer.message_stream(self.prompts[place], tools)
        return growing

    def chunk(self, place: int, output: RequestOutput, growing: _Growing) -> Json:
        delta: Json = {"role": "assistant", "content": ""} if growing.is_first else {}
        is_last = output.result is not None
        message = self._parsed(place, output.result) if output.result is not None and growing.message is None else None
        calls = message is not None
        if growing.message is not None:
            delta |= growing.message.feed(output.token_ids, is_last=is_last)
            calls = is_last and growing.message.num_calls > 0
        elif message is not None:
            delta |= {name: value for name, value in message.items() if value is not None}
            delta |= {"tool_calls": [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]}
        elif is_last or not self.asked.shown_tools:
            text = self._grown(output, growing)
            delta |= {"content": text} if text else {}
        logprobs = None
        if self.asked.logprobs:
            tops = [token.top for token in output.tokens]
            logprobs = self.tokenizer.chat_logprobs(output.token_ids, output.logprobs, tops)
        finish = {"finish_reason": "tool_calls"} if calls else {}
        return {"delta": delta, "logprobs": logprobs, **finish}

    def _parsed(self, place: int, result: RolloutResult) -> Json | None:
        return self.tokenizer.parsed(self.prompts[place], result, self.asked.shown_tools)


def _event(said: Json) -> bytes:
    return f"data: {json.dumps(said, separators=(',', ':'))}\n\n".encode()
