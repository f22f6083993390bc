"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
import uuid
from collections.abc import Mapping
from typing import Final

import msgspec
from starlette.exceptions import HTTPException

from semipd_jax.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    RequestNotFoundError,
    RequestTimeoutError,
    UnavailableError,
)

RETRY_AFTER_S: Final = 1
_MAX_MESSAGE_CHARS: Final = 1000
_STATUSES: Final[dict[type[Exception], int]] = {
    InvalidRequestError: 400,
    RequestNotFoundError: 404,
    DuplicateRequestError: 409,
    OverloadedError: 429,
    RequestFailedError: 500,
    UnavailableError: 503,
    RequestTimeoutError: 504,
}
_TYPES: Final = {
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_TOO_LONG: Final = "context_length_exceeded"
_CODES: Final = {429: "queue_full", 503: "unavailable", 504: "request_timeout"}
_FIELDS: Final = {
    "chat": "messages",
    "ids": "tokens",
    "include_stop": "include_stop_str_in_output",
}
"""Our name of a field → OpenAI's or vLLM's."""

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        more_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:_MAX_MESSAGE_CHARS]
        self.param = param
        self.code = code or _CODES.get(status)
        self._more_headers = more_headers or {}

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.status == 504:  # OpenAI's clients would ask for the same again
            headers.append((b"x-should-retry", b"false"))
        if self.status in (429, 503):
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        more = self._more_headers.items()
        return headers + [(name.lower().encode(), value.encode()) for name, value in more]

    @property
    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def api_error(error: Exception) -> ApiError:
    """What a client is told about an error. What nobody foresaw says no more than a number that is
    also in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), more_headers=error.headers)
    status = _STATUSES.get(type(error))
    if status is None:
        error_id = uuid.uuid4().hex[:12]
        _log.error("internal error %s", error_id, exc_info=error)
        return ApiError(500, f"internal error {error_id}; the server's log says more")
    if not isinstance(error, InvalidRequestError):
        return ApiError(status, str(error))
    param = _FIELDS.get(error.field, error.field) or None
    return ApiError(status, str(error), param=param, code=_TOO_LONG if error.is_too_long else None)
