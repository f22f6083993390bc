"""The private directory of one engine's sockets.

The launcher, and whoever needs it for longer, hold a shared lock on it (flock(2), which the kernel
drops with the last process that has the descriptor). So an engine that was killed leaves a
directory that nobody holds, and the next engine of this user to start removes it.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PREFIX: Final = "semipd-engine-"


def create() -> tuple[str, int]:
    """A new directory, and a descriptor that holds it until closed. Removes abandoned ones."""
    _remove_abandoned()
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX)
        with contextlib.suppress(FileNotFoundError):
            held = hold(path)
            if os.path.exists(path):
                return path, held
            os.close(held)  # another engine's start took it for abandoned before it was held


def hold(path: str) -> int:
    """A descriptor, not inherited, that holds the directory for as long as it is open somewhere.

    Raises FileNotFoundError if the directory is gone.
    """
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def remove(path: str) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path)


def check_private(path: str) -> None:
    """Raises ValueError unless the directory is this user's alone."""
    info = os.stat(path)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != 0o700:
        raise ValueError(f"{path} must belong to this user with mode 0700")


def of_this_user() -> Iterator[Path]:
    """Directories of engines, also of dead ones."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            info = path.lstat()
            if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid():
                yield path


def _remove_abandoned() -> None:
    for path in of_this_user():
        with contextlib.suppress(OSError):  # held, or gone meanwhile
            tried = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(tried, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(tried)
