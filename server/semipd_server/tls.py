"""How our own commands trust a server, and show who they are: the flags of its TLS, from the other
side."""

import argparse
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from semipd_jax.errors import ConfigError
from semipd_server.settings import no_password


def add_tls_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TLS", "Any of these means that the server uses it.")
    group.add_argument(
        "--ssl-ca-certs",
        metavar="FILE",
        help="PEM file of authorities that the server's certificate may come from, or of that "
        "certificate [those that are known]",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="PEM file of a certificate to show")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="PEM file of its key")


@dataclass(frozen=True, slots=True)
class Tls:
    """Values of the flags."""

    ssl_ca_certs: str | None
    ssl_certfile: str | None
    ssl_keyfile: str | None

    @classmethod
    def take(cls, args: dict[str, Any]) -> Self:
        """Takes the flags of `add_tls_flags` out of `args`."""
        return cls(*(args.pop(name) for name in cls.__slots__))

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without any flag.

        Raises:
          ConfigError: a file is missing or of no use.
        """
        files = [f for f in (self.ssl_ca_certs, self.ssl_certfile, self.ssl_keyfile) if f]
        if not files:
            return None
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile are needed, both, to show one")
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca_certs)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
            if self.ssl_certfile is not None:
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, no_password)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise ConfigError(f"cannot use the certificates {', '.join(files)}: {error}") from error
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """`ssl_context` for gRPC."""
        if self.ssl_context() is None:
            return None
        return grpc.ssl_channel_credentials(
            _read(self.ssl_ca_certs), _read(self.ssl_keyfile), _read(self.ssl_certfile)
        )


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
