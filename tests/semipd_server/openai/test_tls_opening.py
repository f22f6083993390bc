"""Connections that have not shaken hands."""

import asyncio
import contextlib
import logging
import socket
import ssl
from typing import Any

import httpx2
import pytest
from certificates import Authority
from openai_rig import while_serving
from server_rig import Rig, Start

from semipd_server import patience
from semipd_server.settings import Settings


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "authority")


def settings(authority: Authority) -> Settings:
    key, certificate = authority.issue("server")
    return Settings(port=0, http_port=0, ssl_keyfile=key, ssl_certfile=certificate)


def connect(rig: Rig) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(rig.url.rsplit(":", 1)[1])))
    client.setblocking(False)
    return client


async def until_closed(client: socket.socket) -> None:
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionResetError):
            while await asyncio.get_running_loop().sock_recv(client, 1 << 16):
                pass


def num_opening(rig: Rig) -> int:
    return rig.front_end._http._opening._num_taken  # pyright: ignore


async def until_opening(rig: Rig, number: int) -> None:
    async with asyncio.timeout(60):
        while num_opening(rig) != number:
            await asyncio.sleep(0.001)


async def serves(rig: Rig, authority: Authority, **options: Any) -> bool:
    context = ssl.create_default_context(cafile=authority.ca)
    transport = httpx2.AsyncHTTPTransport(verify=context, **options)
    async with httpx2.AsyncClient(transport=transport, timeout=60) as client:
        reply = await while_serving(rig, client.get(f"{rig.url}/v1/models"))
        return reply.status_code == 200


def test_who_does_not_shake_hands_is_let_go(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        async with start(settings=settings(authority)) as rig:
            with monkeypatch.context() as patch, connect(rig) as client:
                patch.setattr(patience, "FIRST_WORD_S", 0.2)
                await until_closed(client)
                await until_opening(rig, 0)
            assert await serves(rig, authority)

    asyncio.run(main())


def test_only_so_many_shake_hands_at_a_time(start: Start, authority: Authority):
    async def main():
        with contextlib.ExitStack() as stack:
            async with start(settings=settings(authority), max_calls=2) as rig:
                clients = [stack.enter_context(connect(rig)) for _ in range(5)]
                for client in clients[:3]:
                    await until_closed(client)
                assert num_opening(rig) == 2
                assert await serves(rig, authority, local_address="127.0.0.2")
                assert await serves(rig, authority)

    asyncio.run(main())


def test_the_server_ends_at_once_whoever_shakes_hands(
    start: Start, authority: Authority, caplog: pytest.LogCaptureFixture
):
    async def main():
        async with start(settings=settings(authority)) as rig:
            client = connect(rig)
            await until_opening(rig, 1)
        with client:
            await until_closed(client)
        assert num_opening(rig) == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert caplog.records == []


def test_a_request_may_come_along_with_the_end_of_the_handshake(start: Start, authority: Authority):
    async def main():
        loop = asyncio.get_running_loop()
        received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=authority.ca)
        tls = context.wrap_bio(received, to_send, server_hostname="127.0.0.1")
        async with start(settings=settings(authority)) as rig:
            with connect(rig) as client:
                while True:
                    try:
                        tls.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        await loop.sock_sendall(client, to_send.read())
                        received.write(await loop.sock_recv(client, 1 << 16))
                tls.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                await loop.sock_sendall(client, to_send.read())
                answer = b""
                while b"200 OK" not in answer:
                    receiving = asyncio.ensure_future(loop.sock_recv(client, 1 << 16))
                    await rig.fake.until(receiving.done)
                    assert receiving.result()
                    received.write(receiving.result())
                    with contextlib.suppress(ssl.SSLWantReadError):
                        while True:
                            answer += tls.read()

    asyncio.run(main())
