"""Messages that are no protobuf are the client's fault, and are answered as such."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from inspect import isasyncgenfunction
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

type Context = grpc.aio.ServicerContext[Any, Any]

DAMAGED: Final = "the message cannot be decoded; allowed: what the .proto file defines"


class MessageInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose one request cannot be decoded with INVALID_ARGUMENT; gRPC itself would call
    it INTERNAL, and log it as an error of ours."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        decode = _lenient(handler.request_deserializer)
        if handler.unary_unary is not None:
            inner = _checked(handler.unary_unary)
            return handler._replace(request_deserializer=decode, unary_unary=inner)
        if handler.unary_stream is not None:
            inner = _checked(handler.unary_stream)
            return handler._replace(request_deserializer=decode, unary_stream=inner)
        return handler


def _lenient(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def try_to_decode(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return error

    return try_to_decode


def _checked(inner: Callable[..., Any]) -> Callable[..., Any]:
    async def answer(request: Any, context: Context) -> Any:
        await _refuse_if_damaged(request, context)
        return await inner(request, context)

    async def produce(request: Any, context: Context) -> AsyncGenerator[Any]:
        await _refuse_if_damaged(request, context)
        async for response in inner(request, context):
            yield response

    return produce if isasyncgenfunction(inner) else answer


async def _refuse_if_damaged(request: Any, context: Context) -> None:
    if isinstance(request, DecodeError):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, DAMAGED)
