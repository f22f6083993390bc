"""The gRPC server: inference, health and reflection on one port."""

from typing import Final

import grpc

from semipd_jax.client.prompt import MAX_BYTES_PER_TOKEN
from semipd_jax.errors import StartupError
from semipd_server import control, health, patience, reflection
from semipd_server.auth import AuthInterceptor, Keys
from semipd_server.calls import CallInterceptor, LimitInterceptor
from semipd_server.certificates import server_credentials
from semipd_server.control import ControlServicer
from semipd_server.gate import Gate
from semipd_server.health import HealthServicer
from semipd_server.messages import MessageInterceptor
from semipd_server.pb import control_pb2_grpc as control_grpc
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.reflection import Reflection
from semipd_server.servicer import InferenceServicer
from semipd_server.settings import Settings, vllm_is_installed

SERVICE: Final = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

_MESSAGE_OVERHEAD_BYTES: Final = 1 << 20
_FLUSH_S: Final = 1.0
_MS: Final = 1000


def max_message_bytes(max_model_len: int) -> int:
    """Room for the longest text or ids that may be a prompt, and for everything else."""
    return MAX_BYTES_PER_TOKEN * max_model_len + _MESSAGE_OVERHEAD_BYTES


class Server:
    """Answers health checks from the start, and requests while the gate is open.

    Args:
      max_rpcs: calls at a time; more are refused with RESOURCE_EXHAUSTED.
    """

    def __init__(
        self, gate: Gate, settings: Settings, *, max_model_len: int, max_rpcs: int
    ) -> None:
        self._settings = settings
        self._server = grpc.aio.server(
            interceptors=[
                CallInterceptor(gate.calls),
                AuthInterceptor(Keys(settings.api_keys), health.METHODS),
                MessageInterceptor(),
                LimitInterceptor(gate.calls, max_rpcs, {*health.METHODS, reflection.METHOD}),
            ],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes(max_model_len)),
                ("grpc.so_reuseport", 0),  # else two servers could share a port unnoticed
                # Clients may ping silent streams; the default would cut them off after two pings.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Clients that vanished without a word are found out, and their requests end. gRPC
                # takes the keepalive timeout for TCP; for the answer of a ping it takes its own.
                ("grpc.keepalive_time_ms", _MS * patience.PROBE_AFTER_S),
                ("grpc.keepalive_timeout_ms", _MS * patience.PROBE_ANSWER_S),
                ("grpc.http2.ping_timeout_ms", _MS * patience.PROBE_ANSWER_S),
                ("grpc.server_handshake_timeout_ms", int(_MS * patience.FIRST_WORD_S)),
                # Who has nothing to ask gives its place back, and connects again when it has.
                ("grpc.max_connection_idle_ms", int(_MS * patience.IDLE_S)),
                # Far above what is served, so that clients are refused rather than kept waiting.
                ("grpc.max_allowed_incoming_connections", 2 * max_rpcs),
                ("grpc.max_concurrent_streams", 2 * max_rpcs),
            ],
        )
        pb_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(gate), self._server)
        names = [SERVICE]
        if settings.expose_control:
            control_grpc.add_ControlServiceServicer_to_server(ControlServicer(gate), self._server)
            names.append(control.SERVICE)
        if vllm_is_installed():
            from semipd_server.vllm import servicer as vllm  # needs the extra `smg`

            vllm.pb_grpc.add_VllmEngineServicer_to_server(vllm.VllmServicer(gate), self._server)
            names.append(vllm.SERVICE)
        self._health = HealthServicer(["", *names])
        self._health.add_to(self._server)
        if settings.reflection:
            Reflection([*names, health.SERVICE, reflection.SERVICE]).add_to(self._server)

    async def start(self) -> str:
        """Binds and returns the address, with the port that was taken if the port is 0.

        Raises:
          StartupError: the address cannot be bound.
        """
        host, port = self._settings.host, self._settings.port
        host = f"[{host}]" if ":" in host else host
        try:
            bound = self._bind(f"{host}:{port}")
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {host}:{port}: is the port taken, or the host not ours?"
            ) from error
        await self._server.start()
        return f"{host}:{bound}"

    def set_serving(self, is_serving: bool) -> None:
        """What health checks are told, until `refuse`."""
        self._health.set_serving(is_serving)

    def refuse(self) -> None:
        """Health checks are told for good that this server ends."""
        self._health.end()

    async def stop(self) -> None:
        """Ends every call that its engine has not ended already."""
        self.refuse()
        await self._server.stop(_FLUSH_S)

    def _bind(self, address: str) -> int:
        settings = self._settings
        if not settings.uses_tls:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, server_credentials(settings))
