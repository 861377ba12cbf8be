"""Errors of the server in OpenAI's shape."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)


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

    @classmethod
    def of_fault(cls, error: Exception) -> ApiError:
        """What to tell of an error that is no client's; its words stay here, as they may quote another's prompt."""
        return cls(500, f"the server failed with a {type(error).__name__}.", kind="server_error")

    @property
    def response(self) -> AsciiJSONResponse:
        return AsciiJSONResponse({"error": self.error}, self.status, self.headers)


def log_fault(error: Exception) -> None:
    """Say where a request failed. Not in the error's own words: they may quote a prompt, which logs must not."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("a request failed: %s in %s:%s", type(error).__name__, where.filename, where.lineno)


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: what clients are told of may hold halves of surrogate pairs, which UTF-8 has no bytes for."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()
