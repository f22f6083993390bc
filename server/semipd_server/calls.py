"""Counts of gRPC calls by method and status, and a limit of those that run."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Set
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import grpc

from semipd_jax.errors import OverloadedError
from semipd_server.handlers import Context, wrapped
from semipd_server.status import abort_with, refused

_FULL: Final = "too many calls are running; try again"
_UNKNOWN: Final = "unknown"  # a name that a client made up is no label


class Calls:
    """Calls that ended, by (method, status), and how many run.

    Attributes:
      ended: "/package.Service/Method" and the name of a status code → number.
      num_running: those whose message is there, and that have no bound of their own.
    """

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self.num_running = 0


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Has every call counted when it ends. Goes before the interceptors that refuse."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            self._calls.ended[_UNKNOWN, grpc.StatusCode.UNIMPLEMENTED.name] += 1
            return None
        return wrapped(handler, partial(self._counted, handler_call_details.method))

    @asynccontextmanager
    async def _counted(self, method: str, context: Context) -> AsyncGenerator[None]:
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
            self._calls.ended[method, status.name] += 1


class LimitInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls while `max_running` run. Goes after every other interceptor: what they refuse
    takes no place.

    A call runs from when its message is there until its servicer is done with it, and one that
    finds no place then is refused, too: many may have begun while there was one. gRPC's own limit
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
        if handler is None or handler_call_details.method in self._apart:
            return handler
        if self._is_full:
            return refused(OverloadedError(_FULL))
        return wrapped(handler, self._place)

    @property
    def _is_full(self) -> bool:
        return self._calls.num_running >= self._max_running

    @asynccontextmanager
    async def _place(self, context: Context) -> AsyncGenerator[None]:
        if self._is_full:
            await abort_with(context, OverloadedError(_FULL))
        self._calls.num_running += 1
        try:
            yield
        finally:
            self._calls.num_running -= 1


def _status(context: Context, otherwise: grpc.StatusCode) -> grpc.StatusCode:
    """The status that was set, if one was."""
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else otherwise
