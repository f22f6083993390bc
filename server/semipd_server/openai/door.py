"""What happens to every HTTP request before its route: key, request id, count."""

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
_REQUEST_ID: Final = "x-request-id"


class Door:
    """ASGI middleware around `app`."""

    def __init__(self, app: ASGIApp, gate: Gate, keys: Keys) -> None:
        self._app = app
        self._gate = gate
        self._keys = keys

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
            if scope["path"] in OPEN_PATHS or holder is not None:
                await self._app(scope, receive, send_on)
            else:
                await Reply(send_on).error(ApiError(401, REFUSAL, code="invalid_api_key"))
