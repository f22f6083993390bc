"""Both servers and the gate between them and the engine, from start to end."""

import asyncio
import contextlib
from typing import Final

from semipd_server.auth import Keys
from semipd_server.control import ControlServer
from semipd_server.gate import SHUTTING_DOWN, Engine, Gate
from semipd_server.server import Server, max_message_bytes
from semipd_server.settings import Settings

_JSON_BYTES_PER_BYTE: Final = 3  # of emoji that are escaped; other texts grow less


class FrontEnd:
    """Says from the start whether it serves; serves between `serve` and `drain`.

    Args:
      max_calls: at a time, of each protocol.
      control_socket: path of ControlService's socket; None: no socket.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        max_model_len: int,
        max_calls: int,
        control_socket: str | None = None,
    ) -> None:
        self.gate = Gate()
        self._control = None
        if control_socket is not None:
            self._control = ControlServer(self.gate, Keys(settings.api_keys), control_socket)
        self._grpc = Server(self.gate, settings, max_model_len=max_model_len, max_rpcs=max_calls)
        self._http = None
        if settings.http_port is not None:
            from semipd_server.openai.server import http_server  # needs the extra `openai`

            self._http = http_server(
                self.gate,
                settings,
                max_body_bytes=_JSON_BYTES_PER_BYTE * max_message_bytes(max_model_len),
                max_connections=max_calls,
            )

    async def start(self) -> tuple[str, str | None]:
        """Binds, and returns the address of gRPC and the URL of HTTP.

        Raises:
          StartupError: an address cannot be bound.
        """
        address = await self._grpc.start()
        url = await self._http.start() if self._http is not None else None
        if self._control is not None:
            await self._control.start()
        return address, url

    async def serve(self, engine: Engine) -> None:
        self.gate.waiting_for = ()
        self.gate.open(engine)
        self._grpc.set_serving(True)

    async def set_waiting_for(self, parts: tuple[str, ...]) -> None:
        """What the engine waits for. While it serves, requests are still taken, and wait too."""
        self.gate.waiting_for = parts
        self._grpc.set_serving(self.gate.refusal is None and not parts)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new work; returns when what runs has ended, or in time. Requests can be aborted,
        and the engine watched and controlled, all the while."""
        self.gate.close(SHUTTING_DOWN)
        self._grpc.refuse()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.gate.until_idle(), timeout_s)

    async def stop(self) -> None:
        """Ends every request that its engine has not ended already. Safe to call twice."""
        self.gate.close(SHUTTING_DOWN)
        stops = [self._grpc.stop()]
        if self._control is not None:
            stops.append(self._control.stop())
        if self._http is not None:
            stops.append(self._http.stop())
        await asyncio.gather(*stops)
