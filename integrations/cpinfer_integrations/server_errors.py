"""Errors of the server in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer that says why there is no other.

    Args:
        status: of HTTP.
        message: what is, what was wanted, what to do.
        kind: OpenAI's `type`.
        param: the field of the request that it is about.
        code: OpenAI's.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def response(self) -> AsciiJSONResponse:
        return AsciiJSONResponse({"error": self.error}, self.status, self.headers)


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: what clients are told of may hold halves of surrogate pairs, which UTF-8 has no bytes for."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()
