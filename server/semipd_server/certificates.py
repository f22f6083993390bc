"""The server's certificates, which may be renewed while it runs.

Whoever connects is met with the files as they are then. Those that are of no use are logged, and
what was read before stays: renewal must not end a server that runs.
"""

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from semipd_jax.errors import ConfigError
from semipd_server.settings import Settings

type _Stamps = list[tuple[int, ...] | None]

_log = logging.getLogger(__name__)


def server_credentials(settings: Settings) -> grpc.ServerCredentials:
    """For gRPC, which asks before each handshake.

    Raises:
      ConfigError: a file is missing or of no use.
    """
    files = _Files(settings, _grpc_configuration)
    return grpc.dynamic_ssl_server_credentials(
        files.content,
        lambda: files.content if files.renew() else None,  # pyright: ignore[reportArgumentType]
        require_client_authentication=settings.ssl_ca_certs is not None,
    )


def ssl_contexts(settings: Settings) -> Callable[[], ssl.SSLContext]:
    """For HTTP, which asks before each handshake. A new context knows no session of the one before:
    whoever resumes one is looked at again.

    Raises:
      ConfigError: a file is missing or of no use.
    """
    files = _Files(settings, Settings.ssl_context)

    def current() -> ssl.SSLContext:
        files.renew()
        return files.content

    return current


class _Files[T]:
    """What `read` makes of the files that the settings name."""

    def __init__(self, settings: Settings, read: Callable[[Settings], T]) -> None:
        self._settings = settings
        self._read = read
        self._stamps = _stamps_of(settings)
        self.content = read(settings)

    def renew(self) -> bool:
        """Whether `content` is new: the files have changed, and are of use."""
        stamps = _stamps_of(self._settings)
        if stamps == self._stamps:
            return False
        try:
            content = self._read(self._settings)
        except (ConfigError, OSError) as error:
            self._stamps = stamps
            _log.warning("%s; those that were read before stay in use", error)
            return False
        if stamps != _stamps_of(self._settings):
            return False  # some were read before a change, some after it
        self._stamps, self.content = stamps, content
        _log.info("%s has changed and is in use", self._settings.ssl_certfile)
        return True


def _grpc_configuration(settings: Settings) -> grpc.ServerCertificateConfiguration:
    settings.ssl_context()  # says what is wrong, and whether key and certificate are a pair
    assert settings.ssl_keyfile is not None
    assert settings.ssl_certfile is not None
    authorities = settings.ssl_ca_certs
    return grpc.ssl_server_certificate_configuration(
        [(Path(settings.ssl_keyfile).read_bytes(), Path(settings.ssl_certfile).read_bytes())],
        root_certificates=Path(authorities).read_bytes() if authorities else None,
    )


def _stamps_of(settings: Settings) -> _Stamps:
    files = (settings.ssl_keyfile, settings.ssl_certfile, settings.ssl_ca_certs)
    return [_stamp_of(Path(file)) for file in files if file is not None]


def _stamp_of(file: Path) -> tuple[int, ...] | None:
    """Changes when the file is written, or another one takes its place."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size, info.st_ino
