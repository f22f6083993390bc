"""Who calls, so that the streams of one caller do not make another one's wait: see `CALLER`."""

from ipaddress import IPv4Address, IPv6Network, ip_address
from urllib.parse import unquote

from semipd_jax.client.line import CALLER


def set_grpc_caller(holder: str, peer: str) -> None:
    """`peer` is what gRPC calls the other end."""
    CALLER.set((holder, *grpc_host(peer)))


def grpc_host(peer: str) -> tuple[str, str]:
    """Host, as `one_host` has it, and port of "ipv4:10.0.0.7:51234" or "ipv6:%5B::1%5D:51234"."""
    _scheme, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    return one_host(host.strip("[]")), port


def set_http_caller(holder: str, client: tuple[str, int] | None) -> None:
    """`client` is what ASGI calls the other end."""
    host, port = client or ("", 0)
    CALLER.set((holder, one_host(host), str(port)))


def one_host(address: str) -> str:
    """What an address is counted as when hosts share something evenly: of IPv6 its /64, since one
    host has all of it. What is no address stays as it is."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), 64), strict=False))
