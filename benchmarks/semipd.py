"""This project's server, as the load generator sees it: one to talk to, or one to start."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Final

import grpc

from benchmarks.load import RequestError, Send
from benchmarks.workload import PlannedRequest
from semipd_jax.errors import EngineError, UnavailableError
from semipd_jax.request import Delta
from semipd_server.client import AsyncClient, Client
from semipd_server.pb import inference_pb2 as pb

_POLL_S: Final = 0.2
_STOP_S: Final = 60.0


def sender(client: AsyncClient) -> Send:
    """Greedy, and of exactly the planned length."""

    async def send(request: PlannedRequest) -> AsyncGenerator[Sequence[int]]:
        events = client.generate(
            request.prompt_token_ids,
            temperature=0.0,
            max_tokens=request.output_len,
            ignore_eos=True,
        )
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Delta):
                        yield event.token_ids
        except (EngineError, TimeoutError, grpc.RpcError) as error:
            raise RequestError(_status(error)) from error

    return send


def wait_until_ready(
    target: str, *, timeout_s: float, server: subprocess.Popen[bytes] | None = None
) -> pb.GetModelInfoResponse:
    """What is served at `target`, as soon as it is.

    Raises:
      TimeoutError: it is not ready in time.
      RuntimeError: the process `server` has ended.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with Client(target) as client:
                return client.model_info()
        except UnavailableError as error:
            if server is not None and server.poll() is not None:
                raise RuntimeError(f"the server ended with status {server.returncode}") from error
            if time.monotonic() > deadline:
                raise TimeoutError(f"{target} is not ready after {timeout_s:.0f} s") from error
        time.sleep(_POLL_S)


@contextmanager
def running_server(
    model: str, flags: Sequence[str], *, timeout_s: float
) -> Iterator[tuple[str, pb.GetModelInfoResponse]]:
    """`python -m semipd_jax.serve` on a free port: yields its address and what it serves. It stops
    at the end, also if that is a SIGTERM to this process."""
    target = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "semipd_jax.serve", "--model", model]
    ports = ["--port", target.rpartition(":")[2], "--http-port", "0"]
    server = subprocess.Popen([*command, *ports, *flags])
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield target, wait_until_ready(target, timeout_s=timeout_s, server=server)
    finally:
        server.send_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _end(signum: int, _: object) -> None:
    sys.exit(128 + signum)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _status(error: BaseException) -> str:
    """Name of the gRPC status that the client turned into `error`."""
    cause = error if isinstance(error, grpc.RpcError) else error.__cause__
    return cause.code().name if isinstance(cause, grpc.aio.AioRpcError) else type(error).__name__
