"""What clients may send, in OpenAI's shapes and with vLLM's names for what OpenAI has not; anything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from cpinfer.config import SamplingParams
from cpinfer_integrations.server_errors import ApiError

B = TypeVar("B", bound=BaseModel)

# OpenAI's own limit of `top_logprobs`.
MAX_TOP_LOGPROBS = 20

# By our name of what a request may say of its sampling, the name there.
_SAMPLING: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "n": "n",
    "seed": "seed",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
}

_Zero = Annotated[float, Field(ge=0, le=0)]
_NumTop = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
_Count = Annotated[int, Field(ge=1, le=2**30)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# What is looked through for every token on every rank has to be short.
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_MAX_STOPS = 64
_MAX_BIASES = 1024


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Checked):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class SampledRequest(_Checked):
    """What requests for a completion and for a chat have in common."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=2**16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=_MAX_BIASES)] | None = None
    # Known to every client, and supported in the one value that changes nothing.
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    user: str | None = None
    # vLLM's beside OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**30)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    def sampling(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """How its samples are drawn.

        Args:
            defaults: for what it does not say.
            more: keys of `SamplingParams` that requests spell in ways of their own.

        Returns:
            The parameters. UserError for what they do not allow.
        """
        said: dict[str, Any] = {ours: getattr(self, theirs) for ours, theirs in _SAMPLING.items()}
        said = {name: value for name, value in said.items() if value is not None}
        if self.stop is not None:
            said["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            said["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias is not None:
            said["logit_bias"] = tuple((_token_id(token), bias) for token, bias in self.logit_bias.items())
        return replace(defaults, **said, **more)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(SampledRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[_TokenId] | list[str] | list[list[_TokenId]]
    max_tokens: _Count | None = None
    logprobs: _NumTop | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None
    add_special_tokens: bool | None = None


class ChatRequest(SampledRequest):
    """The body of `/v1/chat/completions`. What a message or a tool has in it, the chat template judges."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _NumTop | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """Those that the model may call."""
        return None if self.tool_choice == "none" else self.tools or None


class TokenizeRequest(_Checked):
    """The body of `/tokenize`: a text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(_Checked):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[_TokenId]


async def body_of(request: Request, schema: type[B]) -> B:
    """What a client sent, as what it has to be.

    Raises:
        ApiError: 415 where it does not say that it sends JSON, as a page of another site could not; 400 for all else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body is {kind[:200] or 'of no type'}; `Content-Type: application/json` was wanted.")
    try:
        return schema.model_validate_json(await request.body())
    except ValidationError as error:
        raise _invalid(error) from error


def query_of(request: Request, schema: type[B]) -> B:
    """What the address of a request says behind its question mark, likewise. ApiError for what is not allowed."""
    try:
        return schema.model_validate_strings(dict(request.query_params))
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}.")
    where = ".".join(map(str, first["loc"]))
    return ApiError(400, f"{where or 'the body'}: {first['msg']}.", param=where or None)


def _token_id(name: str) -> int:
    """A key of `logit_bias`; one that is no number becomes a token id that no model has, which is refused by name."""
    return int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
