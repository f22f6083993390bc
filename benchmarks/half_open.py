"""Connections whose other host is gone: nobody says so, and nobody answers."""

import ctypes
import socket
import struct
from typing import Final

_SO_ATTACH_FILTER: Final = 26
_DROP: Final = struct.pack(
    "HBBI", 0x06, 0, 0, 0
)  # struct sock_filter: return 0 bytes of any packet


def vanish(client: socket.socket) -> None:
    """From now on, nothing that is sent to this end of a TCP connection arrives. Its kernel neither
    acknowledges data nor answers probes, as if the host had lost its power."""
    program = ctypes.create_string_buffer(_DROP)
    filters = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
    client.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filters)
