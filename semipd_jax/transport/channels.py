"""Typed ZeroMQ channels over `ipc://` sockets in a private directory. The one importer of zmq.

The coordinator binds a `Hub` per kind of peer; each peer connects a `Link` under its own name.
Messages are MessagePack of `semipd_jax.messages` unions; anything else raises on receipt. Nothing
is dropped and no sender waits: a `Hub` keeps what a peer has not read yet, which is bounded by what
the peer asked for, and a peer that sends faster than the hub reads gets `BlockingIOError`.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio

from semipd_jax.run_dir import check_private

WORKERS: Final = "workers"
CLIENTS: Final = "clients"
"""Names of the coordinator's two sockets."""

_HIGH_WATER_MARK: Final = 8192
_LINGER_MS: Final = 1000
_MAX_IPC_PATH: Final = 100  # of 108 bytes in sockaddr_un

_encoder = msgspec.msgpack.Encoder()


def endpoint(run_dir: str, name: str) -> str:
    """ZeroMQ address of socket `name`; raises ValueError unless `run_dir` is private to us."""
    check_private(run_dir)
    path = str(Path(run_dir) / name)
    if len(path) > _MAX_IPC_PATH:
        raise ValueError(f"socket path is too long ({len(path)} > {_MAX_IPC_PATH}): {path}")
    return f"ipc://{path}"


class Hub[Incoming, Outgoing]:
    """The coordinator's end: many peers, each known by name."""

    def __init__(self, run_dir: str, name: str, incoming: Any) -> None:
        address = endpoint(run_dir, name)
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind(address)
        self._path = Path(run_dir) / name

    def send(self, peer: str, message: Outgoing) -> bool:
        """Queues a message. Returns False if the peer is gone."""
        try:
            self._socket.send_multipart([peer.encode(), _encoder.encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def receive(self) -> Iterator[tuple[str, Incoming]]:
        """Yields (peer, message) for everything that has arrived."""
        while True:
            try:
                peer, payload = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield peer.decode(), self._decoder.decode(payload)

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


class Link[Incoming, Outgoing]:
    """A peer's end, blocking."""

    def __init__(self, run_dir: str, name: str, identity: str, incoming: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._socket = _dealer(zmq.Context.instance(), endpoint(run_dir, name), identity)

    def send(self, message: Outgoing) -> None:
        """Queues a message; raises BlockingIOError if the coordinator does not read."""
        try:
            self._socket.send(_encoder.encode(message), zmq.DONTWAIT)
        except zmq.Again as error:
            raise BlockingIOError("the coordinator does not read") from error

    def receive(self, timeout_s: float) -> Incoming | None:
        """The next message, or None if none came in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close()


class AsyncLink[Incoming, Outgoing]:
    """A peer's end on an asyncio loop."""

    def __init__(self, run_dir: str, name: str, identity: str, incoming: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(incoming)
        address = endpoint(run_dir, name)
        self._context = zmq.asyncio.Context()
        self._socket = _dealer(self._context, address, identity)

    def send(self, message: Outgoing) -> None:
        """Queues a message; raises BlockingIOError if the coordinator does not read."""
        # The asynchronous socket's own send, done at once: a plain one would swallow the wake-up of
        # a message that is arriving.
        sent = self._socket.send(_encoder.encode(message), zmq.DONTWAIT)
        try:
            sent.result()
        except zmq.Again as error:
            raise BlockingIOError("the coordinator does not read") from error

    async def receive(self) -> Incoming:
        return self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
        """Returns at once. What was sent last may be on its way for a moment longer."""
        self._socket.close()
        threading.Thread(target=self._context.term, name="linger", daemon=True).start()


class Poller:
    """Waits for hubs, links and file descriptors."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()

    def add(self, source: "Hub[Any, Any] | Link[Any, Any] | int") -> None:
        self._poller.register(source if isinstance(source, int) else source._socket, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        self._poller.poll(int(timeout_s * 1000))


def _dealer(context: Any, address: str, identity: str) -> Any:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.set_hwm(_HIGH_WATER_MARK)
    socket.connect(address)
    return socket
