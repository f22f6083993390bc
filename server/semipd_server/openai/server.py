"""The HTTP server: uvicorn on the front end's own event loop, without signal handlers."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, cast

import h11
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from semipd_jax.errors import StartupError
from semipd_server import patience
from semipd_server.auth import Keys
from semipd_server.callers import one_host
from semipd_server.certificates import ssl_contexts
from semipd_server.gate import Gate
from semipd_server.metrics import Metrics
from semipd_server.openai.app import build_app
from semipd_server.openai.door import OPEN_PATHS
from semipd_server.openai.errors import ApiError, bad_request
from semipd_server.openai.places import Places
from semipd_server.openai.reply import Reply
from semipd_server.openai.tls_opening import TlsOpening
from semipd_server.settings import Settings

_KEEP_ALIVE_S: Final = 75
_FLUSH_S: Final = 1


def http_server(
    gate: Gate, settings: Settings, *, max_body_bytes: int, max_connections: int
) -> "HttpServer":
    """All routes, as the settings say."""
    metrics = Metrics(gate, settings.metrics_prefix)
    keys = Keys(settings.api_keys)
    app = build_app(
        gate,
        metrics,
        keys,
        max_body_bytes=max_body_bytes,
        own_names_only=settings.is_local and not settings.api_keys and not settings.uses_tls,
    )
    return HttpServer(app, settings, max_connections=max_connections)


class HttpServer:
    """Serves `app`.

    Args:
      max_connections: at a time, shared fairly between hosts. As many more are told that there are
        too many, and how the server is. With TLS, as many again may be shaking hands.
    """

    def __init__(self, app: ASGIApp, settings: Settings, *, max_connections: int) -> None:
        self._settings = settings
        served, refused = (Places[_Connection](max_connections) for _ in range(2))
        self._opening = Places[TlsOpening](max_connections)
        connection = partial(_Connection, served, refused)
        if settings.uses_tls:
            connection = partial(_opening, ssl_contexts(settings), self._opening, connection)
        config = uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], connection),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # its warnings are of what any client may send
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Binds and returns the URL, with the port that was taken if the port is 0.

        Raises:
          StartupError: the address cannot be bound.
        """
        host, port = self._settings.host, self._settings.http_port
        shown = f"[{host}]" if ":" in host else host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # The event loop turns off Nagle's algorithm only where the protocol is named.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _find_out_who_vanished(listener)
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            listener.close()
            raise StartupError(
                f"cannot listen on {shown}:{port} (http_port): {error.strerror}"
            ) from error
        bound = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listener]), name="http")
        return f"{'https' if self._settings.uses_tls else 'http'}://{shown}:{bound}"

    async def stop(self) -> None:
        """Ends every request that its engine has not ended already."""
        self._server.should_exit = True
        self._opening.clear()
        if self._serving is not None:
            await self._serving
            self._serving = None


def _opening(
    context: Callable[[], ssl.SSLContext],
    places: Places[TlsOpening],
    connection: Callable[..., asyncio.Protocol],
    **kwargs: Any,
) -> TlsOpening:
    """What uvicorn takes for a protocol of HTTP."""
    return TlsOpening(context, places, partial(connection, **kwargs))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the launcher's."""
        yield


def _find_out_who_vanished(listener: socket.socket) -> None:
    """Connections, which inherit this, end when the other host is gone without a word: while there
    is nothing to send it is asked now and then, and what was sent must be acknowledged in time."""
    patience_s = patience.PROBE_AFTER_S + patience.PROBE_ANSWER_S
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, patience.PROBE_AFTER_S),
        (socket.TCP_KEEPINTVL, patience.PROBE_ANSWER_S),
        (socket.TCP_USER_TIMEOUT, 1000 * patience_s),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


class _Connection(H11Protocol):
    """Ends a connection whose client takes too long: to begin a request, to end its headers, or to
    read what it is sent. What uvicorn would refuse by itself gets an error in OpenAI's shape."""

    host = ""
    _due: asyncio.TimerHandle | None = None  # the next request
    _stalled: asyncio.TimerHandle | None = None

    def __init__(
        self, served: "Places[_Connection]", refused: "Places[_Connection]", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._served = served
        self._refused = refused

    @property
    def is_idle(self) -> bool:
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    def close(self) -> None:
        """What was answered is still sent, if it can be soon."""
        self.transport.close()
        self.loop.call_later(_FLUSH_S, self.transport.abort)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.host = one_host(self.client[0]) if self.client else ""
        if not self._served.take(self):
            self.app = _open_paths_only(self.app)
            if not self._refused.take(self):
                transport.abort()
                return
        self._due = self.loop.call_later(patience.FIRST_WORD_S, transport.abort)

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # what its client has sent was no HTTP
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._served.leave(self)
        self._refused.leave(self)
        self._due = _cancelled(self._due)
        self._stalled = _cancelled(self._stalled)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._due = _cancelled(self._due)
        elif self._due is None:  # headers have begun
            self._due = self.loop.call_later(patience.FIRST_WORD_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(patience.READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stalled = _cancelled(self._stalled)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        error = bad_request(msg)
        length = str(len(error.body)).encode()
        headers = [*error.headers, (b"content-length", length), (b"connection", b"close")]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=error.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _open_paths_only(app: ASGIApp) -> ASGIApp:
    """What a connection gets that found no place: whoever watches the server must not take one that
    is busy for one that is down. It may try again on another connection."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if scope["path"] in OPEN_PATHS:
            await app(scope, receive, send_last)
        else:
            await Reply(send_last).error(ApiError(503, "too many connections; try again"))

    return answer


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
