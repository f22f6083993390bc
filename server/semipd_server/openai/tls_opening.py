"""Connections whose TLS handshake has not ended."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import cast

from semipd_server import patience
from semipd_server.callers import one_host
from semipd_server.openai.places import Places


class TlsOpening(asyncio.Protocol):
    """Shakes hands, for as long as a client is waited for, then hands the connection on.

    asyncio's own TLS servers know of a connection only after that, and so bound neither how many
    there are nor of whom.

    Args:
      context: makes that of a handshake.
      places: for those that have not ended.
      then: makes the protocol that goes on.
    """

    host = ""
    is_idle = True
    _transport: asyncio.Transport

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        places: "Places[TlsOpening]",
        then: Callable[[], asyncio.Protocol],
    ) -> None:
        self._context = context
        self._places = places
        self._then = then
        self._early = b""
        self._is_lost = False
        self._shaking: asyncio.Task[None] | None = None

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.pause_reading()  # until there is somebody who can decrypt it
        peer = transport.get_extra_info("peername")
        self.host = one_host(peer[0]) if peer else ""
        if self._places.take(self):
            self._shaking = asyncio.ensure_future(self._shake_hands())
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """What came along with the end of the handshake."""
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True

    async def _shake_hands(self) -> None:
        loop = asyncio.get_running_loop()
        if self._transport.is_closing():
            return
        tls = None
        with contextlib.suppress(OSError):  # an SSLError is one; so is too late
            tls = await loop.start_tls(
                self._transport,
                self,
                self._context(),
                server_side=True,
                ssl_handshake_timeout=patience.FIRST_WORD_S,
            )
        self._places.leave(self)
        if tls is None or self._is_lost:
            self._transport.abort()
            return
        protocol = self._then()
        tls.set_protocol(protocol)
        protocol.connection_made(tls)
        if self._early and not tls.is_closing():
            protocol.data_received(self._early)
