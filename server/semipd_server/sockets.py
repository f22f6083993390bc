"""Where a Unix socket may be."""

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from semipd_jax.errors import StartupError

_MAX_PATH_BYTES: Final = 107  # sun_path, with its final zero
_CONNECT_TIMEOUT_S: Final = 1.0


def require_free(path: str) -> None:
    """Raises StartupError if `path` cannot be the control socket. One that a server left behind is
    in nobody's way."""
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise StartupError(
            f"control_socket is {path!r}; allowed: a path of at most {_MAX_PATH_BYTES} bytes"
        )
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise StartupError(
            f"control_socket is {path!r}; allowed: a path in a directory that this user may write "
            "to"
        )
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartupError(f"cannot use {path} (control_socket): {error.strerror}") from error
    if not is_socket:
        raise StartupError(f"cannot listen on {path} (control_socket): it is no socket")
    if has_listener(path):
        raise StartupError(f"cannot listen on {path} (control_socket): another server does")


def has_listener(path: str) -> bool:
    """Whether a process listens on this socket; a server that was killed leaves it behind."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(_CONNECT_TIMEOUT_S)
        probe.connect(path)
        return True
    return False
