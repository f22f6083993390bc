"""The gRPC server: inference, health and reflection on one port."""

import asyncio
import contextlib
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from semipd_jax.client.prompt import MAX_BYTES_PER_TOKEN
from semipd_jax.errors import StartupError
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.servicer import Engine, InferenceServicer

SERVICE: Final = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

SHUTTING_DOWN: Final = "the server is shutting down"

_SERVICES: Final = ("", SERVICE)  # "" is the server as a whole
_MESSAGE_OVERHEAD_BYTES: Final = 1 << 20
_FLUSH_S: Final = 1.0


def max_message_bytes(max_model_len: int) -> int:
    """Room for the longest text or ids that may be a prompt, and for everything else."""
    return MAX_BYTES_PER_TOKEN * max_model_len + _MESSAGE_OVERHEAD_BYTES


class Server:
    """Answers health checks from the start, and requests between `serve` and `drain`.

    Args:
      max_rpcs: calls at a time; more are refused with RESOURCE_EXHAUSTED.
    """

    def __init__(self, *, max_model_len: int, max_rpcs: int) -> None:
        self._servicer = InferenceServicer()
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes(max_model_len)),
                ("grpc.so_reuseport", 0),  # else two servers could share a port unnoticed
                # Clients may ping silent streams; the default would cut them off after two pings.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Clients that vanished without a word are found out, and their requests end.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
            maximum_concurrent_rpcs=max_rpcs,
        )
        pb_grpc.add_InferenceServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> str:
        """Binds and returns the address, with the port that was taken if `port` is 0.

        Raises:
          StartupError: the address cannot be bound.
        """
        for service in _SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        host = f"[{host}]" if ":" in host else host
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {host}:{port}: is the port taken, or the host not ours?"
            ) from error
        await self._server.start()
        return f"{host}:{bound}"

    async def serve(self, engine: Engine) -> None:
        self._servicer.serve(engine)
        for service in _SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests; returns when the running ones have ended, or in time."""
        self._servicer.refuse(SHUTTING_DOWN)
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._servicer.until_idle(), timeout_s)

    async def stop(self) -> None:
        """Ends every call that its engine has not ended already."""
        self._servicer.refuse(SHUTTING_DOWN)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(_FLUSH_S)
