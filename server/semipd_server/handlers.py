"""gRPC's handlers of methods, with something around every call."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import grpc

type Context = grpc.aio.ServicerContext[Any, Any]

_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def wrapped(handler: Any, around: Callable[[Context], AbstractAsyncContextManager[None]]) -> Any:
    """The handler, a coroutine of any kind; each of its calls is inside `around(context)`."""
    kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
    inner = getattr(handler, kind)

    async def answer(request: Any, context: Context) -> Any:
        async with around(context):
            return await inner(request, context)

    return handler._replace(**{kind: answer})
