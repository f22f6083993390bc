"""`python -m benchmarks.uncounted`: the front end without its counters and its check of keys.

They cannot be turned off. What they cost is measured against this.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import grpc

from semipd_jax.child import Child, run_child
from semipd_jax.client import engine_client
from semipd_jax.client.observations import Observations, RequestTimes
from semipd_jax.errors import EngineError
from semipd_jax.request import Timings
from semipd_server import main as front_end
from semipd_server import server


class _Uncounted(Observations):
    """Is told everything and keeps nothing."""

    def refusal(self, error: EngineError) -> None:
        pass

    def admitted(self, prompt_len: int) -> None:
        pass

    def token(self, times: RequestTimes, now_s: float) -> None:
        pass

    def ended(self, times: RequestTimes, prompt_len: int, reason: str, timings: Timings) -> None:
        pass

    def gave_up(self, reason: str) -> None:
        pass


class _PassOn(grpc.aio.ServerInterceptor):
    """In the place of an interceptor that counts or checks."""

    def __init__(self, *_: object) -> None:
        pass

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        return await continuation(handler_call_details)


@contextmanager
def uncounted() -> Iterator[None]:
    """Servers and engine clients that are made inside count nothing and let everyone in."""
    with (
        mock.patch.object(engine_client, "Observations", _Uncounted),
        mock.patch.object(server, "CallInterceptor", _PassOn),
        mock.patch.object(server, "AuthInterceptor", _PassOn),
    ):
        yield


def main(child: Child) -> None:
    with uncounted():
        front_end.main(child)


if __name__ == "__main__":
    run_child(main)
