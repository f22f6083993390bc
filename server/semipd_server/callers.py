"""Who calls, so that the streams of one caller do not make another one's wait: see `CALLER`."""

from urllib.parse import unquote

from semipd_jax.client.turns import CALLER


def set_grpc_caller(holder: str, peer: str) -> None:
    """`peer` is what gRPC calls the other end."""
    CALLER.set((holder, *grpc_host(peer)))


def grpc_host(peer: str) -> tuple[str, str]:
    """Host and port of "ipv4:10.0.0.7:51234" or "ipv6:%5B::1%5D:51234"."""
    _scheme, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def set_http_caller(holder: str, client: tuple[str, int] | None) -> None:
    """`client` is what ASGI calls the other end."""
    host, port = client or ("", 0)
    CALLER.set((holder, host, str(port)))
