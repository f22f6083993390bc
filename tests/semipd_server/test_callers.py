"""Requests of different clients can be told apart, so that turns can be shared between them."""

import asyncio
from contextvars import copy_context
from typing import Any

import pytest
from openai_rig import openai_client
from server_rig import Rig, Start

from semipd_jax.client.line import CALLER
from semipd_server.callers import set_grpc_caller, set_http_caller
from semipd_server.client import AsyncClient
from semipd_server.settings import Settings

KEYS = ("first-key", "second-key")


async def callers_of_both_protocols(rig: Rig, key: str) -> list[tuple[str, ...]]:
    """What three connections of one client are called: the first is of gRPC, two are of HTTP."""
    async with (
        AsyncClient(rig.address, api_key=key) as grpc,
        openai_client(rig, key) as first,
        openai_client(rig, key) as second,
    ):
        options: dict[str, Any] = {"model": "tiny", "prompt": [5], "max_tokens": 2}
        work = [asyncio.ensure_future(grpc.complete([5], max_tokens=2))]
        await rig.fake.until(lambda: len(rig.engine._streams) == 1, stepping=False)
        work += [asyncio.ensure_future(c.completions.create(**options)) for c in (first, second)]
        await rig.fake.until(lambda: len(rig.engine._streams) == 3, stepping=False)
        found = [stream.caller for stream in rig.engine._streams.values()]
        answered = asyncio.gather(*work)
        await rig.fake.until(answered.done)
        await answered
    return found


def test_callers_are_told_apart_by_key_host_and_connection(start: Start):
    async def main():
        async with start(settings=Settings(port=0, http_port=0, api_keys=KEYS)) as rig:
            for number, key in enumerate(KEYS):
                callers = await callers_of_both_protocols(rig, key)
                assert {caller[:2] for caller in callers} == {(str(number), "127.0.0.1")}
                assert_connections_differ(callers)

    asyncio.run(main())


def assert_connections_differ(callers: list[tuple[str, ...]]) -> None:
    """Those to one port of the server: others may have a port in common."""
    of_grpc, *of_http = (caller[2] for caller in callers)
    assert of_grpc.isdigit()
    assert len(set(of_http)) == 2


def test_without_keys_what_a_client_says_to_be_its_key_makes_no_difference(start: Start):
    async def main():
        async with start() as rig:
            for key in KEYS:
                callers = await callers_of_both_protocols(rig, key)
                assert {caller[:2] for caller in callers} == {("", "127.0.0.1")}
                assert_connections_differ(callers)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("peer", "address", "host", "connection"),
    [
        ("ipv4:10.0.0.7:51234", "10.0.0.7", "10.0.0.7", "51234"),
        ("ipv6:%5B2001:db8::1%5D:51234", "2001:db8::1", "2001:db8::/64", "51234"),
        ("ipv6:%5B2001:db8::ffff:2%5D:51234", "2001:db8::ffff:2", "2001:db8::/64", "51234"),
        ("ipv6:[2001:db8:0:1::1]:51234", "2001:db8:0:1::1", "2001:db8:0:1::/64", "51234"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:51234", "::ffff:10.0.0.7", "10.0.0.7", "51234"),
        ("ipv6:%5Bfe80::1%25eth0%5D:51234", "fe80::1%eth0", "fe80::/64", "51234"),
        ("unix:", "", "", ""),
    ],
)
def test_a_host_has_one_name_over_grpc_and_http(
    peer: str, address: str, host: str, connection: str
):
    def callers() -> tuple[tuple[str, ...], tuple[str, ...]]:
        set_grpc_caller("a", peer)
        over_grpc = CALLER.get()
        set_http_caller("a", (address, 51234))
        return over_grpc, CALLER.get()

    over_grpc, over_http = copy_context().run(callers)
    assert over_grpc == ("a", host, connection)
    assert over_http == ("a", host, "51234")
