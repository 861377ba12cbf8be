"""Chats: messages as callers write them, through a tokenizer's chat template to token ids."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cpinfer.errors import UserError, quoted
from cpinfer.refusals import refuse

# What OpenAI's interfaces, Transformers and vLLM call a part of a message that is text.
_TEXT_PARTS = ("text", "input_text", "output_text")
# Under this name a template reads the chat itself.
_CHAT = "messages"
Message = dict[str, Any]


def chat_token_ids(messages: Any, tokenizer: Any, tools: Any = None, template_kwargs: Any = None) -> tuple[int, ...]:
    """The tokens of a chat, up to where its answer goes on: Transformers' `apply_chat_template` decides them.

    A final assistant message is continued; behind any other the template begins one. Text parts of a message go to a
    template that walks over parts as they are, and to any other as one text, joined by newlines.

    Args:
        messages: objects with "role" and "content".
        tokenizer: with a chat template.
        tools: JSON schemas of tools for the template, or None.
        template_kwargs: an object of whatever else the template reads (`enable_thinking`), or None.

    Returns:
        Token ids, none when the template renders nothing.

    Raises:
        UserError: for messages that are none, for what the template refuses, or does not read.
        UnsupportedError: for parts that are no text.
    """
    parted = _messages(messages)
    options = {**_tools(tools), **_template_kwargs(template_kwargs, tokenizer)}
    ends_open = parted[-1]["role"] == "assistant"
    turn = {"continue_final_message": True} if ends_open else {"add_generation_prompt": True}
    try:
        _refuse_unread(options, tokenizer)
        chat = parted if _walks_parts(parted, tokenizer, options) else [_joined(message) for message in parted]
        return tuple(tokenizer.apply_chat_template(chat, return_dict=False, **turn, **options))
    except UserError:
        raise
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise UserError(f'"messages" do not fit the chat template: {str(error)[:200]}.') from error


def _messages(given: Any) -> list[Message]:
    """The messages with each list of parts in one form, `{"type": "text", "text": ...}`. UserError when they are none.

    Content that is null is left out: templates would print its name.
    """
    if not isinstance(given, Sequence) or not given or not all(isinstance(m, Mapping) for m in given):
        raise UserError(
            f'"messages" is {quoted(given)}; "messages" must be a list of objects with "role" and "content".'
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _message(given: Mapping[str, Any], where: str) -> Message:
    message = {key: value for key, value in given.items() if key != "content"}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str):
        raise UserError(f'"{where}.role" is {quoted(role)}; a text was wanted, as "user".')
    if isinstance(content, str):
        return {**message, "content": content}
    if isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)) and content:
        return {**message, "content": [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]}
    if content is None and role == "assistant" and given.get("tool_calls"):
        return message
    found = "missing" if "content" not in given else quoted(content)
    raise UserError(f'"{where}.content" is {found}; a text or a list of text parts was wanted.')


def _part(given: Any, where: str) -> Message:
    if isinstance(given, str):
        return {"type": "text", "text": given}
    kind = given.get("type") if isinstance(given, Mapping) else None
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        raise refuse("multimodal", f'"{where}" is a part of type {quoted(kind)}')
    if kind not in _TEXT_PARTS or not isinstance(given.get("text"), str):
        raise UserError(f'"{where}" is {quoted(given)}; {{"type": "text", "text": ...}} was wanted.')
    return {"type": "text", "text": given["text"]}


def _joined(message: Message) -> Message:
    """The message with its parts as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _walks_parts(messages: Sequence[Message], tokenizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the template renders the parts of these messages one by one, instead of losing or quoting them.

    Asked with a mark in place of each part: the same roles at the same places, and no text that could look like one.
    """
    marks: list[str] = []

    def marked(message: Message) -> Message:
        if not isinstance(message.get("content"), list):
            return message
        names = [f"part{len(marks) + i}of" for i in range(len(message["content"]))]
        marks.extend(names)
        return {**message, "content": [{"type": "text", "text": name} for name in names]}

    asked = [marked(message) for message in messages]
    if not marks:
        return False
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False, **options)
    except Exception:  # such a template wants texts, or nothing will do
        return False
    return isinstance(text, str) and all(
        mark in text and f"'{mark}'" not in text and f'"{mark}"' not in text for mark in marks
    )


def _tools(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(t, Mapping) for t in given):
        raise UserError(f'"tools" is {quoted(given)}; a list of objects was wanted, the JSON schemas of tools.')
    return {"tools": [dict(tool) for tool in given]} if given else {}


def _template_kwargs(given: Any, tokenizer: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UserError(
            f'"chat_template_kwargs" is {quoted(given)}; an object was wanted, as {{"enable_thinking": false}}.'
        )
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    taken = {a.name for a in arguments if a.kind is not a.VAR_KEYWORD} | {_CHAT}
    for name in given:
        if name in taken:
            raise UserError(
                f'"chat_template_kwargs" has {quoted(name)}, which is no variable of the template: cpinfer itself says '
                "it to the tokenizer, from the line's messages and tools. Leave it out."
            )
    return dict(given)


def _refuse_unread(options: Mapping[str, Any], tokenizer: Any) -> None:
    """UserError for what the template never mentions: it would have no effect, without a word."""
    if not options:
        return
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            where = '"tools" are given' if name == "tools" else f'"chat_template_kwargs" has {quoted(name)}'
            raise UserError(f"{where}, which the model's chat template does not read. Leave it out.")
