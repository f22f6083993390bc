"""The RPCs of semipd.v1.ControlService, and the private socket that they are served on."""

import asyncio
import contextlib
import functools
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, cast

import grpc
from google.protobuf.message import Message

from semipd_jax.errors import InvalidRequestError, StartupError
from semipd_server.auth import AuthInterceptor, Keys
from semipd_server.control_convert import partition_message, stats_message
from semipd_server.gate import Gate
from semipd_server.pb import control_pb2 as pb
from semipd_server.pb import control_pb2_grpc as pb_grpc
from semipd_server.servicer import send
from semipd_server.sockets import require_free
from semipd_server.status import abort_with

type Context = grpc.aio.ServicerContext[Any, Any]

SERVICE: Final = pb.DESCRIPTOR.services_by_name["ControlService"].full_name

_MAX_CALLS: Final = 64
_MAX_MESSAGE_BYTES: Final = 4096
_INTERVAL_MS: Final = (100, 60_000)
_FLUSH_S: Final = 1.0


def _rpc[M: Callable[..., Awaitable[Any]]](method: M) -> M:
    """Around every RPC: an error is a status. Nobody waits for these calls at the end."""

    @functools.wraps(method)
    async def call(self: "ControlServicer", request: Message, context: Context) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await abort_with(context, error)

    return cast(M, call)


class ControlServicer(pb_grpc.ControlServiceServicer):
    """Serves what is behind the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @_rpc
    async def GetPartition(  # noqa: N802
        self, request: pb.GetPartitionRequest, context: Context
    ) -> pb.GetPartitionResponse:
        partition = await self._gate.engine.client.partition()
        return pb.GetPartitionResponse(partition=partition_message(partition))

    @_rpc
    async def SetPartition(  # noqa: N802
        self, request: pb.SetPartitionRequest, context: Context
    ) -> pb.SetPartitionResponse:
        partition = await self._gate.engine.client.set_partition(
            prefill=_given(request, "prefill_share"),
            decode=_given(request, "decode_share"),
            policy=_given(request, "policy"),
        )
        return pb.SetPartitionResponse(partition=partition_message(partition))

    @_rpc
    async def SetSlo(self, request: pb.SetSloRequest, context: Context) -> pb.SetSloResponse:  # noqa: N802
        if not request.HasField("slo"):
            raise InvalidRequestError("slo is missing; allowed: an Slo", field="slo")
        partition = await self._gate.engine.client.set_slo(
            ttft_ms=_given(request.slo, "ttft_ms"),
            tpot_ms=_given(request.slo, "tpot_ms"),
            priority=_given(request.slo, "priority"),
            target=_given(request, "target"),
            remove=request.remove,
        )
        return pb.SetSloResponse(partition=partition_message(partition))

    @_rpc
    async def WatchPartition(  # noqa: N802
        self, request: pb.WatchPartitionRequest, context: Context
    ) -> None:
        interval_ms = request.interval_ms if request.HasField("interval_ms") else 1000
        least, most = _INTERVAL_MS
        if not least <= interval_ms <= most:
            text = f"interval_ms is {interval_ms}; allowed: {least} to {most}"
            raise InvalidRequestError(text, field="interval_ms")
        while True:
            stats = await self._gate.engine.client.stats()
            await send(context, pb.WatchPartitionResponse(stats=stats_message(stats)))
            await asyncio.sleep(interval_ms / 1000)


class ControlServer:
    """ControlService on a Unix socket that nobody but this process's user can connect to."""

    def __init__(self, gate: Gate, keys: Keys, path: str) -> None:
        self._path = path
        self._server = grpc.aio.server(
            interceptors=[AuthInterceptor(keys)],
            options=[("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)],
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        pb_grpc.add_ControlServiceServicer_to_server(ControlServicer(gate), self._server)

    async def start(self) -> None:
        """Raises StartupError if the socket cannot be bound."""
        require_free(self._path)
        try:
            with _private_files():
                self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {self._path} (control_socket)") from error
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(_FLUSH_S)


def _given(message: Any, field: str) -> Any:
    """The value of an optional field, or None."""
    return getattr(message, field) if message.HasField(field) else None


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """What is created meanwhile is readable and writable by its owner alone."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
