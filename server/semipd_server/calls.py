"""Counts of gRPC calls by method and status, and a limit of those that run."""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Set
from contextlib import contextmanager
from typing import Any, Final

import grpc

from semipd_jax.errors import OverloadedError
from semipd_server.status import refused

_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_FULL: Final = "too many calls are running; try again"
_UNKNOWN: Final = "unknown"  # a name that a client made up is no label


class Calls:
    """Calls that ended, by (method, status), and how many have not.

    Attributes:
      ended: "/package.Service/Method" and the name of a status code → number.
      num_running: those that have no bound of their own.
    """

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self.num_running = 0

    @contextmanager
    def counted(self, method: str, context: "grpc.aio.ServicerContext[Any, Any]", weight: int):
        """Around one call."""
        self.num_running += weight
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
            self.num_running -= weight
            self.ended[method, status.name] += 1


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Has every call counted, and refuses new ones while `max_running` run. Goes before the
    interceptors that refuse.

    A call runs from when its message is there until its servicer is done with it. gRPC's own limit
    also counts calls whose client never ends its message or never reads its answers: a few such
    clients would lock all others out.

    Args:
      apart: methods that are not among the running, since they need no bound, or have their own.
    """

    def __init__(self, calls: Calls, max_running: int, apart: Set[str]) -> None:
        self._calls = calls
        self._max_running = max_running
        self._apart = apart

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self._calls.ended[_UNKNOWN, grpc.StatusCode.UNIMPLEMENTED.name] += 1
            return None
        if self._calls.num_running >= self._max_running and method not in self._apart:
            handler = refused(OverloadedError(_FULL))
        kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
        count = self._stream if handler.response_streaming else self._unary
        return handler._replace(**{kind: count(method, getattr(handler, kind))})

    def _counted(self, method: str, context: "grpc.aio.ServicerContext[Any, Any]"):
        return self._calls.counted(method, context, weight=0 if method in self._apart else 1)

    def _unary(self, method: str, inner: Callable[..., Awaitable[Any]]) -> Any:
        async def call(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            with self._counted(method, context):
                return await inner(request, context)

        return call

    def _stream(self, method: str, inner: Callable[..., Any]) -> Any:
        async def write(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            with self._counted(method, context):
                await inner(request, context)

        async def produce(
            request: Any, context: "grpc.aio.ServicerContext[Any, Any]"
        ) -> AsyncGenerator[Any]:
            with self._counted(method, context):
                async for response in inner(request, context):
                    yield response

        return produce if inspect.isasyncgenfunction(inner) else write


def _status(
    context: "grpc.aio.ServicerContext[Any, Any]", otherwise: grpc.StatusCode
) -> grpc.StatusCode:
    """The status that was set, if one was."""
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else otherwise
