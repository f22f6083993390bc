"""What happens to every HTTP request before its route: key, host, request id, count."""

import re
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from semipd_server.auth import REFUSAL, Keys
from semipd_server.callers import set_http_caller
from semipd_server.gate import Gate
from semipd_server.openai.errors import ApiError
from semipd_server.openai.reply import Reply
from semipd_server.trace_context import set_trace_context

OPEN_PATHS: Final = frozenset({"/health", "/dashboard"})
"""The latter is a page without data, whatever the engine does: it shows that the server lives."""
_OWN_NAME: Final = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?")
_OWN_NAMES: Final = "localhost, 127.0.0.1 or [::1]"
_REQUEST_ID: Final = "x-request-id"


class Door:
    """ASGI middleware around `app`.

    Args:
      own_names_only: refuse requests to a host with another name than this machine has for itself:
        a web page may have its own name lead here, and its browser then lets it ask and read.
    """

    def __init__(self, app: ASGIApp, gate: Gate, keys: Keys, *, own_names_only: bool) -> None:
        self._app = app
        self._gate = gate
        self._keys = keys
        self._own_names_only = own_names_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = headers.get(_REQUEST_ID)
        holder = self._keys.holder(headers.get("authorization"))
        set_http_caller(holder or "", scope["client"])
        set_trace_context(headers)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and request_id is not None:
                MutableHeaders(scope=message)[_REQUEST_ID] = request_id
            await send(message)

        with self._gate.inside():
            error = None
            if scope["path"] not in OPEN_PATHS:
                error = self._refusal(holder, headers.get("host", ""))
            if error is None:
                await self._app(scope, receive, send_on)
            else:
                await Reply(send_on).error(error)

    def _refusal(self, holder: str | None, host: str) -> ApiError | None:
        if holder is None:
            return ApiError(401, REFUSAL, code="invalid_api_key")
        if self._own_names_only and _OWN_NAME.fullmatch(host.lower()) is None:
            text = f"the host is {host!r:.80}; allowed: {_OWN_NAMES}; any, if the server has a key"
            return ApiError(403, text)
        return None
