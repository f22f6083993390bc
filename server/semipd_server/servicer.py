"""The RPCs of semipd.v1.InferenceService."""

import asyncio
import functools
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc
from google.protobuf.message import Message

from semipd_jax.client import EngineClient
from semipd_jax.errors import UnavailableError
from semipd_server.convert import event_message, prompt_from, sampling_from
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.status import abort_with

type Context = grpc.aio.ServicerContext[Any, Any]

_REQUEST_ID_KEY: Final = "x-request-id"


@dataclass(frozen=True, slots=True)
class Engine:
    """What the servicer serves."""

    client: EngineClient
    info: pb.GetModelInfoResponse


def rpc[M: Callable[..., Awaitable[Any]]](method: M) -> M:
    """Around every RPC: the call is counted, its x-request-id comes back, an error is a status."""

    @functools.wraps(method)
    async def call(self: "InferenceServicer", request: Message, context: Context) -> Any:
        self._begin()
        try:
            if echo := [p for p in context.invocation_metadata() or () if p[0] == _REQUEST_ID_KEY]:
                await context.send_initial_metadata(tuple(echo))
            return await method(self, request, context)
        except Exception as error:
            await abort_with(context, error)
        finally:
            self._end()

    return cast(M, call)


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Refuses everything until it is given an engine, and again when it drains."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._refusal = "the engine is starting"
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def serve(self, engine: Engine) -> None:
        self._engine = engine

    def refuse(self, reason: str) -> None:
        """New calls end with UNAVAILABLE; running ones go on."""
        self._engine, self._refusal = None, reason

    async def until_idle(self) -> None:
        """Returns when no call is running."""
        await self._idle.wait()

    @rpc
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        client = self._serving().client
        request_id = request.request_id or uuid.uuid4().hex
        events = client.generate(
            prompt_from(request), sampling_from(request.sampling), request_id=request_id
        )
        async with aclosing(events):
            async for event in events:
                await context.write(event_message(event, request_id))

    @rpc
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        await self._serving().client.abort(request.request_id)
        return pb.AbortResponse()

    @rpc
    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        client = self._serving().client
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        ids = await client.encode(prompt_from(request), add_special_tokens=special)
        return pb.TokenizeResponse(ids=ids)

    @rpc
    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        client = self._serving().client
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await client.decode(tuple(request.ids), skip_special_tokens=skip)
        return pb.DetokenizeResponse(text=text)

    @rpc
    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return self._serving().info

    def _serving(self) -> Engine:
        if self._engine is None:
            raise UnavailableError(self._refusal)
        return self._engine

    def _begin(self) -> None:
        self._num_calls += 1
        self._idle.clear()

    def _end(self) -> None:
        self._num_calls -= 1
        if self._num_calls == 0:
            self._idle.set()
