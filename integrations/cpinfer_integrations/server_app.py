"""The routes of a server, by Starlette, and what stands in front of them: the API key, limits of size and pace."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.engine.engine import Engine
from cpinfer.errors import UserError
from cpinfer.packages import named
from cpinfer_integrations.server_config import ServerConfig

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cpinfer_integrations.server_answers import Chat, Completion, Reply
    from cpinfer_integrations.server_bridge import Answers, Bridge
    from cpinfer_integrations.server_control import Control
    from cpinfer_integrations.server_errors import ApiError, AsciiJSONResponse, log_fault
    from cpinfer_integrations.server_schemas import (
        ChatRequest,
        CompletionRequest,
        DetokenizeRequest,
        SampledRequest,
        TokenizeRequest,
        body_of,
    )
    from cpinfer_integrations.server_text import ServerTokenizer
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

# The longest answer of a completion whose request names none: OpenAI's.
COMPLETION_TOKENS = 16
_ONE_TOKEN = SamplingParams(max_new_tokens=1)


@dataclass(eq=False)
class Api:
    """The routes, over the engine that answers."""

    bridge: Bridge
    tokenizer: ServerTokenizer
    config: ServerConfig
    sampling: SamplingParams
    created: int

    @property
    def engine(self) -> Engine:
        return self.bridge.engine

    @property
    def model_name(self) -> str:
        return self.config.model_name or "policy"

    async def completions(self, request: Request) -> Response:
        """Continue texts, or token ids."""
        asked = await body_of(request, CompletionRequest)
        self._check(asked.model, asked.n)
        is_scored = asked.logprobs is not None
        if asked.echo and is_scored and asked.stream:
            raise ApiError(
                400, "logprobs of a prompt (echo with logprobs) are not streamed; leave one out.", param="echo"
            )
        params = self._params(
            asked,
            max_new_tokens=asked.max_tokens or COMPLETION_TOKENS,
            top_logprobs=asked.logprobs or 0,
            prompt_logprobs=bool(asked.echo and is_scored),
        )
        prompts = await self._prompts(asked)
        texts = self._texts(asked, prompts) if asked.echo else ()
        reply = Completion(asked, self.model_name, self.tokenizer, prompts, params.n, params.stop, texts=texts)
        return await self._reply(request, reply, params)

    async def chat(self, request: Request) -> Response:
        """Continue a chat."""
        asked = await body_of(request, ChatRequest)
        self._check(asked.model, asked.n)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, '"top_logprobs" needs "logprobs": true.', param="top_logprobs")
        token_ids = await self.tokenizer.read_chat(asked.messages, asked.shown_tools, asked.chat_template_kwargs)
        longest = self._longest
        self._check_length(token_ids, longest)
        most = asked.max_completion_tokens or asked.max_tokens or max(1, longest + 1 - len(token_ids))
        params = self._params(asked, max_new_tokens=most, top_logprobs=asked.top_logprobs or 0)
        reply = Chat(asked, self.model_name, self.tokenizer, [token_ids], params.n, params.stop)
        return await self._reply(request, reply, params)

    async def models(self, _: Request) -> Response:
        """The one model there is."""
        return AsciiJSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """The model of that name."""
        self._check(request.path_params["name"])
        return AsciiJSONResponse(self._model)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, or of a chat up to where its answer begins."""
        asked = await body_of(request, TokenizeRequest)
        self._check(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, 'exactly one of "prompt" and "messages" was wanted.')
        if asked.messages is not None:
            token_ids = await self.tokenizer.read_chat(asked.messages, asked.tools, asked.chat_template_kwargs)
        else:
            assert asked.prompt is not None, "one of them is there"
            token_ids = await self.tokenizer.read_text(
                asked.prompt, add_special_tokens=asked.add_special_tokens is not False
            )
        return AsciiJSONResponse(
            {"tokens": token_ids, "count": len(token_ids), "max_model_len": self.engine.max_positions}
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special ones included."""
        asked = await body_of(request, DetokenizeRequest)
        self._check(asked.model)
        if len(asked.tokens) > self.engine.max_positions:
            raise ApiError(
                400, f"{len(asked.tokens)} tokens; at most {self.engine.max_positions} were wanted.", param="tokens"
            )
        try:
            return AsciiJSONResponse({"prompt": self.tokenizer.text(asked.tokens)})
        except (IndexError, OverflowError, TypeError, ValueError) as error:
            raise ApiError(400, f"no text is made of these tokens: {error}.", param="tokens") from error

    async def health(self, _: Request) -> Response:
        """Whether requests are taken."""
        return Response(status_code=200 if self.bridge.is_ready else 503)

    async def scrape(self, _: Request) -> Response:
        """What Prometheus reads."""
        return Response(self.bridge.metrics.text(), media_type="text/plain; version=0.0.4")

    @property
    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "cpinfer",
            "max_model_len": self.engine.max_positions,
        }

    @property
    def _longest(self) -> int:
        """The longest prompt that leaves room for a token."""
        return self.engine.longest_prompt(_ONE_TOKEN)

    def _check(self, model: str | None, n: int | None = None) -> None:
        if model is not None and model != self.model_name:
            raise ApiError(
                404,
                f"there is no model {model[:200]!r} here; {self.model_name!r} is.",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )
        if n is not None and n > self.config.max_n:
            raise ApiError(400, f"n is {n}; at most {self.config.max_n} was wanted (max_n).", param="n")

    def _check_length(self, token_ids: Sequence[int], longest: int) -> None:
        longest = min(self.config.max_prompt_tokens or longest, longest)
        if len(token_ids) > longest:
            raise ApiError(
                400,
                f"the prompt has {len(token_ids)} tokens; at most {longest} fit. Shorten it.",
                param="prompt",
                code="context_length_exceeded",
            )

    def _params(self, asked: SampledRequest, **more: Any) -> SamplingParams:
        params = asked.sampling(self.sampling, **more)
        if params.stop and not self.tokenizer.has_words:
            raise ApiError(400, '"stop" needs a tokenizer, the model\'s folder has none. Use "stop_token_ids".')
        return params

    async def _prompts(self, asked: CompletionRequest) -> list[Sequence[int]]:
        given: Any = asked.prompt
        many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if len(many) * (asked.n or 1) > self.config.max_open_requests:
            raise ApiError(
                400,
                f"{len(many)} prompts, n={asked.n or 1}: at most {self.config.max_open_requests} samples were wanted.",
            )
        special, longest = asked.add_special_tokens is not False, self._longest
        prompts: list[Sequence[int]] = []
        for one in many:
            prompts.append(
                await self.tokenizer.read_text(one, add_special_tokens=special) if isinstance(one, str) else one
            )
            self._check_length(prompts[-1], longest)
        return prompts

    def _texts(self, asked: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[str]:
        if isinstance(asked.prompt, str):
            return [asked.prompt]
        given: Sequence[Any] = asked.prompt
        if given and isinstance(given[0], str):
            return list(given)
        return [self.tokenizer.text(token_ids) for token_ids in prompts]

    async def _reply(self, request: Request, reply: Reply, params: SamplingParams) -> Response:
        is_seeded, in_pieces = reply.asked.seed is not None, bool(reply.asked.stream)
        answers = await self.bridge.ask(reply.prompts, params, is_seeded=is_seeded, in_pieces=in_pieces)
        if in_pieces:
            return _EventStream(reply.events(answers), answers)
        try:
            return AsciiJSONResponse(await _while_connected(request, reply.whole(answers)))
        finally:
            answers.leave()


class _EventStream(StreamingResponse):
    """Server-sent events, whose answers are left when the client has them all, or is gone."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.leave()


class Gate:
    """In front of all routes: whoever lacks the key, sends too much or too slowly gets no further.

    A body is read here, whole, so that a route has it at once or not at all.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, api_key: str | None) -> None:
        self._app = app
        self._max_bytes = int(config.max_body_mib * 2**20)
        self._max_arrival_s = config.max_arrival_s
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            async with asyncio.timeout(self._max_arrival_s):
                body = await self._body(scope, receive)
        except TimeoutError:
            late = ApiError(
                408,
                f"the request did not arrive within {self._max_arrival_s:g} s (max_arrival_s).",
                headers={"Connection": "close"},  # what may yet come of it is not waited for
            )
            await late.response(scope, receive, send)
        except ApiError as error:
            await error.response(scope, receive, send)
        else:
            try:
                await self._app(scope, _replayed(body, receive), send)
            except Exception as error:  # it has been answered
                log_fault(error)

    def _check_key(self, scope: Scope) -> None:
        if self._authorization is None or scope["path"] == "/health":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._authorization):
            raise ApiError(
                401,
                "no valid API key was given; the header `Authorization: Bearer KEY` was wanted.",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        parts, num_bytes = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return b""
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > self._max_bytes:
                raise ApiError(
                    413,
                    f"the body has more than {self._max_bytes} bytes (max_body_mib).",
                    headers={"Connection": "close"},
                )
            if not message.get("more_body"):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What a route receives: the body that is here, then what comes."""
    first: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` comes to; it is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "the client has gone.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def make_app(api: Api, control: Control, api_key: str | None) -> Any:
    """The ASGI application of these routes."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        api.bridge.start()
        yield
        api.tokenizer.close()

    routes: Sequence[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = (
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/metrics", api.scrape),
        *control.routes,
    )
    app = Starlette(
        routes=[Route(path, route, methods=[method]) for method, path, route in routes],
        exception_handlers={
            ApiError: _tell_api_error,
            UserError: _tell_user_error,
            HTTPException: _tell_http_error,
            Exception: _tell_fault,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST reaches nothing
    return Gate(app, api.config, api_key)


async def _tell_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "that is what it is registered for"
    return error.response


async def _tell_user_error(_: Request, error: Exception) -> Response:
    return ApiError(400, str(error)).response


async def _tell_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "that is what it is registered for"
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return ApiError(error.status_code, f"{error.detail}.", kind=kind, headers=error.headers).response


async def _tell_fault(_: Request, error: Exception) -> Response:
    return ApiError.of_fault(error).response
