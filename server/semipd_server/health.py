"""grpc.health.v1: whether requests are taken. Anyone may ask, so a question costs next to nothing:
one that is longer than its answer needs, or names no service of ours, is refused at once."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from semipd_jax.errors import OverloadedError
from semipd_server.open_calls import OpenCalls
from semipd_server.servicer import Context, send
from semipd_server.status import abort_with

SERVICE: Final = health.SERVICE_NAME
METHODS: Final = frozenset({f"/{SERVICE}/Check", f"/{SERVICE}/Watch"})

_MAX_REQUEST_BYTES: Final = 256
_MAX_WATCHES: Final = 1024

type _Request = health_pb2.HealthCheckRequest
type _Response = health_pb2.HealthCheckResponse


class HealthServicer:
    """Tells the same of every service; NOT_SERVING at first.

    Args:
      services: full names; "" is the server as a whole.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._has_ended = False
        self._changed = asyncio.Event()
        self._watches = OpenCalls("health watches", most=_MAX_WATCHES)

    def add_to(self, server: grpc.aio.Server) -> None:
        encode = health_pb2.HealthCheckResponse.SerializeToString
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, _decode, encode),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, _decode, encode),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((handler,))

    def set_serving(self, is_serving: bool) -> None:
        """What is told, until `end`."""
        if self._has_ended:
            return
        kind = health_pb2.HealthCheckResponse
        self._status = kind.SERVING if is_serving else kind.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """From now on NOT_SERVING is told."""
        self.set_serving(False)
        self._has_ended = True

    async def _check(self, request: _Request, context: Context) -> _Response:
        await self._require_known(request.service, context)
        return health_pb2.HealthCheckResponse(status=self._status)

    async def _watch(self, request: _Request, context: Context) -> None:
        await self._require_known(request.service, context)
        try:
            async with self._watches.one_more(context.peer()):
                await self._tell(context)
        except OverloadedError as error:
            await abort_with(context, error)

    async def _tell(self, context: Context) -> None:
        """Writes the status, and again whenever it changes."""
        told = None
        while True:
            if told != self._status:
                told = self._status
                await send(context, health_pb2.HealthCheckResponse(status=told))
            else:
                await self._changed.wait()

    async def _require_known(self, service: str, context: Context) -> None:
        if service not in self._services:
            allowed = ", ".join(repr(name) for name in sorted(self._services))
            text = f"service is {service!r}; allowed: {allowed}"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)


def _decode(data: bytes) -> Any:
    if len(data) > _MAX_REQUEST_BYTES:  # would be kept as long as it is watched
        raise DecodeError(f"it is longer than {_MAX_REQUEST_BYTES} bytes")
    return health_pb2.HealthCheckRequest.FromString(data)
