"""A call's one request message: one that does not come in time, or is no protobuf, is the client's
fault, and is answered as such."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from semipd_server import patience
from semipd_server.handlers import Context
from semipd_server.status import end

DAMAGED: Final = "the message cannot be decoded; allowed: what the .proto file defines"
_MISSING: Final = "there is no message; allowed: one"


class MessageInterceptor(grpc.aio.ServerInterceptor):
    """Reads the messages of calls that have one. gRPC itself would wait for it for ever, call a
    damaged one INTERNAL, and log it as an error of ours."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            reading = handler._replace(stream_stream=_reading(handler.unary_stream))
        else:
            reading = handler._replace(stream_unary=_reading(handler.unary_unary))
        # Over the wire, one message is a stream of one.
        return reading._replace(request_streaming=True, unary_unary=None, unary_stream=None)


def _reading(inner: Callable[..., Any]) -> Callable[..., Any]:
    """What answers a stream of one message as `inner` answers the message."""

    async def answer(_requests: object, context: Context) -> Any:
        return await inner(await _message(context), context)

    return answer


async def _message(context: Context) -> Any:
    """Ends the call if there is none. gRPC must not be cancelled while it reads; to end the call
    makes it give up."""
    give_up = asyncio.get_running_loop().call_later(patience.BODY_S, _give_up, context)
    try:
        message = await context.read()
    except DecodeError:
        await _refuse(context, DAMAGED)
    finally:
        give_up.cancel()
    if message is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
        await _refuse(context, _MISSING)
    return message


async def _refuse(context: Context, text: str) -> NoReturn:
    try:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    except grpc.aio.InternalError as error:  # the client has left
        raise asyncio.CancelledError from error


def _give_up(context: Context) -> None:
    text = f"the message took longer than {patience.BODY_S:.0f} s"
    end(context, grpc.StatusCode.ABORTED, text)
