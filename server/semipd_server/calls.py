"""Counts of gRPC calls by method and status, also of those that never reached a servicer."""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import contextmanager
from typing import Any, Final

import grpc

_UNKNOWN: Final = "unknown"  # a name that a client made up is no label


class Calls:
    """Calls that ended, by (method, status), and how many have not.

    Attributes:
      ended: "/package.Service/Method" and the name of a status code → number.
    """

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self.num_running = 0

    @contextmanager
    def counted(self, method: str, context: "grpc.aio.ServicerContext[Any, Any]"):
        """Around one call."""
        self.num_running += 1
        status = grpc.StatusCode.INTERNAL
        try:
            yield
            status = _status(context, grpc.StatusCode.OK)
        except asyncio.CancelledError:
            left_s = context.time_remaining()
            is_late = left_s is not None and left_s <= 0
            status = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            status = _status(context, grpc.StatusCode.INTERNAL)
            raise
        finally:
            self.num_running -= 1
            self.ended[method, status.name] += 1


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Has every call with one request counted. Goes before the interceptors that refuse."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self._calls.ended[_UNKNOWN, grpc.StatusCode.UNIMPLEMENTED.name] += 1
        elif handler.unary_unary is not None:
            return handler._replace(unary_unary=self._unary(method, handler.unary_unary))
        elif handler.unary_stream is not None:
            return handler._replace(unary_stream=self._stream(method, handler.unary_stream))
        return handler

    def _unary(self, method: str, inner: Callable[..., Awaitable[Any]]) -> Any:
        async def call(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            with self._calls.counted(method, context):
                return await inner(request, context)

        return call

    def _stream(self, method: str, inner: Callable[..., Any]) -> Any:
        async def write(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            with self._calls.counted(method, context):
                await inner(request, context)

        async def produce(
            request: Any, context: "grpc.aio.ServicerContext[Any, Any]"
        ) -> AsyncGenerator[Any]:
            with self._calls.counted(method, context):
                async for response in inner(request, context):
                    yield response

        return produce if inspect.isasyncgenfunction(inner) else write


def _status(
    context: "grpc.aio.ServicerContext[Any, Any]", otherwise: grpc.StatusCode
) -> grpc.StatusCode:
    """The status that was set, if one was."""
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else otherwise
