"""The memory owner's end: hands every region to each process of this user that asks.

An answer is a header (`HEADER`: length of the manifest) that carries one descriptor per region
(SCM_RIGHTS), then the manifest: JSON of `list[Region]` in the same order.
"""

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from semipd_jax.run_dir import check_private
from semipd_jax.storage.backend import Reservation
from semipd_jax.storage.manifest import SharingError

HEADER: Final = struct.Struct("<I")
_PEER: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_MAX_SOCKET_PATH: Final = 107
_CLIENT_TIMEOUT_S: Final = 5.0
_log = logging.getLogger(__name__)


def socket_path(run_dir: str) -> str:
    return str(Path(run_dir) / "memory")


class MemoryServer:
    """A listening socket in `run_dir`, which must be private to this user."""

    def __init__(self, run_dir: str, reservations: Sequence[Reservation]) -> None:
        check_private(run_dir)
        self._path = socket_path(run_dir)
        if len(self._path) > _MAX_SOCKET_PATH:
            raise ValueError(f"socket path is longer than {_MAX_SOCKET_PATH}: {self._path}")
        self._fds = [reservation.fd for reservation in reservations]
        self._manifest = msgspec.json.encode([reservation.region for reservation in reservations])
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self._path)
        self._socket.listen()

    def fileno(self) -> int:
        """Readable when a process has connected: call `answer`."""
        return self._socket.fileno()

    def answer(self) -> None:
        """Answers one process. One that is refused, gone or does not read is dropped."""
        client, _ = self._socket.accept()
        with client:
            client.settimeout(_CLIENT_TIMEOUT_S)
            try:
                check_peer(client)
                socket.send_fds(client, [HEADER.pack(len(self._manifest))], self._fds)
                client.sendall(self._manifest)
            except (OSError, SharingError) as error:
                _log.warning("a process did not get the memory: %s", error)

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def check_peer(connection: socket.socket) -> None:
    """Raises SharingError unless the other process runs as this user."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(peer)
    if uid != os.geteuid():
        raise SharingError(f"process {pid} belongs to user {uid}, not to {os.geteuid()}")
