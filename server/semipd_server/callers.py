"""Who calls, so that the streams of one caller do not make another one's wait: see `CALLER`."""

from semipd_jax.client.turns import CALLER


def set_grpc_caller(holder: str, peer: str) -> None:
    """`peer` is what gRPC calls the other end, such as "ipv4:10.0.0.7:51234"."""
    CALLER.set((holder, peer.rpartition(":")[0], peer))


def set_http_caller(holder: str, client: tuple[str, int] | None) -> None:
    """`client` is what ASGI calls the other end."""
    host, port = client or ("", 0)
    CALLER.set((holder, host, str(port)))
