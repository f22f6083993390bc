"""gRPC's handlers of methods, with something around every call."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from inspect import isasyncgenfunction
from typing import Any, Final

import grpc

type Context = grpc.aio.ServicerContext[Any, Any]

_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def wrapped(handler: Any, around: Callable[[Context], AbstractAsyncContextManager[None]]) -> Any:
    """The handler; each of its calls is inside `around(context)`."""
    kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
    inner = getattr(handler, kind)

    async def answer(request: Any, context: Context) -> Any:
        async with around(context):
            return await inner(request, context)

    async def produce(request: Any, context: Context) -> AsyncGenerator[Any]:
        async with around(context):
            async for response in inner(request, context):
                yield response

    return handler._replace(**{kind: produce if isasyncgenfunction(inner) else answer})
