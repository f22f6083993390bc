"""The HTTP server: uvicorn on the front end's own event loop, without signal handlers."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from semipd_jax.errors import StartupError
from semipd_server import patience
from semipd_server.auth import Keys
from semipd_server.gate import Gate
from semipd_server.metrics import Metrics
from semipd_server.openai.app import build_app
from semipd_server.openai.errors import ApiError, bad_request
from semipd_server.openai.reply import Reply
from semipd_server.settings import Settings

_KEEP_ALIVE_S: Final = 75
_FLUSH_S: Final = 1


def http_server(
    gate: Gate, settings: Settings, *, max_body_bytes: int, max_connections: int
) -> "HttpServer":
    """All routes, as the settings say."""
    metrics = Metrics(gate, settings.metrics_prefix)
    app = build_app(gate, metrics, Keys(settings.api_keys), max_body_bytes=max_body_bytes)
    return HttpServer(app, settings, max_connections=max_connections)


class HttpServer:
    """Serves `app`.

    Args:
      max_connections: more are answered with 503, and more than twice as many not at all.
    """

    def __init__(self, app: ASGIApp, settings: Settings, *, max_connections: int) -> None:
        self._settings = settings
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=max_connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
            ssl_context_factory=(lambda *_: settings.ssl_context()) if settings.uses_tls else None,
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
        if self._serving is not None:
            await self._serving
            self._serving = None


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

    _due: asyncio.TimerHandle | None = None  # the next request
    _stalled: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.limit_concurrency is not None
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * self._max_connections:
            transport.abort()
        else:
            self._due = self.loop.call_later(patience.FIRST_WORD_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._due = _cancelled(self._due)
        self._stalled = _cancelled(self._stalled)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_full = len(self.connections) > self._max_connections
        self.app = _refuse if is_full else self.config.loaded_app
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


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """In the place of the app, while there are too many connections."""
    await Reply(send).error(ApiError(503, "too many connections; try again"))


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
