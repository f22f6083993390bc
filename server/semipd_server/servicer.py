"""The RPCs of semipd.v1.InferenceService."""

import asyncio
import functools
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, Protocol, cast

import grpc
from google.protobuf.message import Message

from semipd_server import patience
from semipd_server.auth import HOLDER
from semipd_server.callers import set_grpc_caller
from semipd_server.convert import event_message, field_path, prompt_from, sampling_from
from semipd_server.gate import Gate
from semipd_server.handlers import Context
from semipd_server.limits import MAX_ENTRIES, check_entries
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.status import abort_with, end
from semipd_server.trace_context import set_trace_context

_REQUEST_ID_KEY: Final = "x-request-id"

_log = logging.getLogger(__name__)


class Servicer(Protocol):
    """What `rpc` needs of a servicer.

    Attributes:
      entries: full name of a repeated field → most entries; others may have none.
    """

    gate: Gate
    entries: Mapping[str, int]

    @staticmethod
    def path_of(field: str) -> str:
        """Where a field that an InvalidRequestError names is in the contract's requests."""
        ...


def rpc[M: Callable[..., Awaitable[Any]]](method: M) -> M:
    """Around every RPC: the gate counts the call, its x-request-id comes back, its message is
    within limits, an error is a status."""

    @functools.wraps(method)
    async def call(self: Servicer, request: Message, context: Context) -> Any:
        with self.gate.inside():
            try:
                metadata = context.invocation_metadata() or ()
                set_trace_context(dict(metadata))
                set_grpc_caller(HOLDER.get(), context.peer())
                if echo := [pair for pair in metadata if pair[0] == _REQUEST_ID_KEY]:
                    await context.send_initial_metadata(tuple(echo))
                check_entries(request, self.gate.engine.info.max_model_len, self.entries)
                return await method(self, request, context)
            except Exception as error:
                await abort_with(context, error, self.path_of)

    return cast(M, call)


async def send(context: Context, message: Message) -> None:
    """Writes the next message of a stream. If the client has left this moment, or has read nothing
    for too long, the call is cancelled. In the latter case its status comes after what the client
    has not read, should it ever read on."""
    try:
        async with asyncio.timeout(patience.READ_S):
            await context.write(message)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error
    except TimeoutError as error:
        text = f"nothing was read for {patience.READ_S:.0f} s"
        _log.warning("a call is given up: %s", text)
        end(context, grpc.StatusCode.ABORTED, text)
        raise asyncio.CancelledError from error


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Serves what is behind the gate."""

    entries = MAX_ENTRIES
    path_of = staticmethod(field_path)

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    @rpc
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        client = self.gate.admit().client
        request_id = request.request_id or uuid.uuid4().hex
        events = client.generate(
            prompt_from(request),
            sampling_from(request.sampling),
            request_id=request_id,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        async with aclosing(events):
            async for event in events:
                await send(context, event_message(event, request_id))

    @rpc
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        await self.gate.engine.client.abort(request.request_id)
        return pb.AbortResponse()

    @rpc
    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        client = self.gate.admit().client
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        ids = await client.encode(prompt_from(request), add_special_tokens=special)
        return pb.TokenizeResponse(ids=ids)

    @rpc
    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        client = self.gate.admit().client
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await client.decode(tuple(request.ids), skip_special_tokens=skip)
        return pb.DetokenizeResponse(text=text)

    @rpc
    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return self.gate.engine.info
