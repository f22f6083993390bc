"""The directory of compiled programs: machine code that we run, so nobody else may write there."""

import os
import stat
from pathlib import Path

from semipd_jax.errors import ConfigError


def cache_root(directory: str | None) -> Path:
    """`location(directory)`; made if it is not there.

    Raises:
      ConfigError: it cannot be made, or is not private.
    """
    root = location(directory)
    make_private(root)
    return root


def location(directory: str | None) -> Path:
    """`directory` or, in the user's cache directory, semipd_jax.

    Raises:
      ConfigError: neither $XDG_CACHE_HOME nor a home tells where that is.
    """
    if directory:
        return Path(directory)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # such a value has no meaning
        try:
            caches = Path.home() / ".cache"
        except RuntimeError as error:
            raise ConfigError(
                "compile_cache_dir is None; allowed: a directory, for a user without home"
            ) from error
    return caches / "semipd_jax"


def make_private(path: Path) -> None:
    """Raises ConfigError if it cannot be made, belongs to another user or is writable by others."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise ConfigError(
            f"compile_cache_dir is {str(path)!r}; allowed: a directory that can be made: "
            f"{error.strerror}"
        ) from error
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"compile_cache_dir is {str(path)!r}; allowed: a directory of this user that nobody "
            "else may write to"
        )
