"""Server reflection: tools ask what services there are. A stream that asks nothing is ended."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection, reflection_pb2

from semipd_server import patience
from semipd_server.messages import DAMAGED
from semipd_server.open_calls import OpenCalls
from semipd_server.servicer import Context, send
from semipd_server.status import abort_with

SERVICE: Final = reflection.SERVICE_NAME
METHOD: Final = f"/{SERVICE}/ServerReflectionInfo"

_MAX_STREAMS: Final = 64


class Reflection:
    """Answers from the descriptors of what is served.

    Args:
      services: full names.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._answers: Any = reflection.aio.ReflectionServicer(services)  # pyright: ignore[reportAttributeAccessIssue]
        self._streams = OpenCalls("reflection streams", most=_MAX_STREAMS)

    def add_to(self, server: grpc.aio.Server) -> None:
        info = grpc.stream_stream_rpc_method_handler(
            self._info,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, {"ServerReflectionInfo": info})
        server.add_generic_rpc_handlers((handler,))

    async def _info(self, requests: AsyncIterable[Any], context: Context) -> None:
        try:
            async with self._streams.one_more(context.peer()):
                asked = _in_time(requests, context)
                async for answer in self._answers.ServerReflectionInfo(asked, context):
                    await send(context, answer)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, DAMAGED)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort_with(context, error)


async def _in_time(requests: AsyncIterable[Any], context: Context) -> AsyncGenerator[Any]:
    """Ends the call when the next request does not come. Reading goes on until then: gRPC does not
    take back what it has begun."""
    source = aiter(requests)
    while True:
        reading = asyncio.ensure_future(anext(source, None))
        reading.add_done_callback(_heard)
        await asyncio.wait((reading,), timeout=patience.NEXT_S)
        if not reading.done():
            text = f"nothing was asked for {patience.NEXT_S:.0f} s"
            await context.abort(grpc.StatusCode.ABORTED, text)
        if (request := reading.result()) is None:
            return
        yield request


def _heard(reading: "asyncio.Future[Any]") -> None:
    """An error after the end of the call is nobody's."""
    if not reading.cancelled():
        reading.exception()
