"""Clients that mean no good, and a model directory that does not either."""

import asyncio
import contextlib
import inspect
import json
import logging
import socket
from pathlib import Path
from typing import Any

import h11
import httpx2
import pytest
from openai_rig import http_bytes, openai_client, request, while_serving
from server_rig import Rig, Start, serving
from tiny_tokenizers import save_byte_level

from semipd_jax.request import FinishReason
from semipd_jax.text.tokenizer import load_tokenizer
from semipd_server import patience
from semipd_server.openai import app as app_module
from semipd_server.openai import reply as reply_module
from semipd_server.settings import Settings


def connections(rig: Rig) -> set[Any]:
    return rig.front_end._http._server.server_state.connections  # pyright: ignore


def connect(rig: Rig, **options: int) -> socket.socket:
    host, port = rig.url.removeprefix("http://").rsplit(":", 1)
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    client.connect((host, int(port)))
    client.setblocking(False)
    return client


async def until_closed(client: socket.socket) -> bytes:
    loop, received = asyncio.get_running_loop(), b""
    async with asyncio.timeout(60):
        while piece := await loop.sock_recv(client, 1 << 16):
            received += piece
    return received


async def until_received(client: socket.socket, end: bytes) -> bytes:
    loop, received = asyncio.get_running_loop(), b""
    async with asyncio.timeout(60):
        while end not in received:
            piece = await loop.sock_recv(client, 1 << 16)
            assert piece, received
            received += piece
    return received


async def still_serves(rig: Rig) -> bool:
    body = {"prompt": "Hi", "max_tokens": 1}
    return (await request(rig, "POST", "/v1/completions", json=body)).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"])
def test_a_connection_without_a_request_is_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes
):
    async def main():
        async with start() as rig:
            with monkeypatch.context() as patch:
                patch.setattr(patience, "FIRST_WORD_S", 0.2)
                with connect(rig) as client:
                    client.send(sent)
                    with contextlib.suppress(ConnectionResetError):
                        assert await until_closed(client) == b""
            assert await still_serves(rig)

    asyncio.run(main())


def test_headers_that_never_end_close_the_connection_of_an_earlier_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    """Each byte of them would put off the end of a connection that is merely kept alive."""

    async def main():
        async with start() as rig:
            with connect(rig) as client, monkeypatch.context() as patch:
                for _ in range(2):  # such connections serve on while their client is quick
                    client.send(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    await until_received(client, b"}")
                patch.setattr(patience, "FIRST_WORD_S", 0.5)
                client.send(b"GET /version HTTP/1.1\r\n")
                closed = asyncio.ensure_future(until_closed(client))
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    while not closed.done():
                        client.send(b"a: b\r\n")
                        await asyncio.sleep(0.05)
                with contextlib.suppress(ConnectionResetError):
                    assert await closed == b""
            assert await still_serves(rig)

    asyncio.run(main())


def test_a_body_that_never_ends_is_408(start: Start, monkeypatch: pytest.MonkeyPatch):
    async def main():
        async with start() as rig:
            with connect(rig) as client, monkeypatch.context() as patch:
                patch.setattr(patience, "BODY_S", 0.2)
                client.send(http_bytes("/v1/completions", {"prompt": "Hi"})[:-3])
                answer = await asyncio.get_running_loop().sock_recv(client, 1 << 16)
                assert answer.startswith(b"HTTP/1.1 408")
            assert rig.fake.submitted == []
            assert await still_serves(rig)

    asyncio.run(main())


def test_a_client_that_never_reads_loses_its_request_and_delays_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patience, "READ_S", 1.0)
    body = {"prompt": [5], "n": 16, "max_tokens": 60, "logprobs": 20, "stream": True}

    async def main():
        async with start() as rig:
            with connect(rig, SO_RCVBUF=4096) as client:
                while not connections(rig):
                    await asyncio.sleep(0.001)
                [connection] = connections(rig)
                ours = connection.transport.get_extra_info("socket")
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                client.send(http_bytes("/v1/completions", body))
                await rig.fake.until(lambda: len(rig.fake.running) == 16, stepping=False)
                assert await still_serves(rig)
                await rig.fake.until(lambda: connection not in connections(rig))
                assert connection.transport.get_write_buffer_size() < 1 << 18
            await rig.fake.until(lambda: not rig.fake.running)
            assert await still_serves(rig)

    asyncio.run(main())


def test_a_queued_stream_is_kept_alive_by_comments(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reply_module, "_KEEP_ALIVE_S", 0.05)
    body = {"prompt": [5], "max_tokens": 2, "stream": True}

    async def main():
        async with start(admits=False) as rig:
            with connect(rig) as client:
                client.send(http_bytes("/v1/completions", body))
                await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
                received = b""
                for _ in range(3):
                    received += await until_received(client, b": keep-alive\n\n")
                assert received.startswith(b"HTTP/1.1 200")
                assert b"data:" not in received
                ended = asyncio.ensure_future(until_received(client, b"[DONE]"))
                await rig.fake.until(ended.done)
                assert ended.result().count(b"data: {") >= 2
            async with openai_client(rig) as openai:
                options: dict[str, Any] = {"model": "tiny", "prompt": [5], "max_tokens": 40}
                whole = await while_serving(rig, openai.completions.create(**options))
                create = openai.completions.create(**options, stream=True)
                creating = asyncio.ensure_future(create)
                await rig.fake.until(creating.done, stepping=False)  # a comment brings the headers
                texts = asyncio.ensure_future(_texts(creating.result()))
                rig.fake.step()
                await asyncio.sleep(0.2)  # comments come between the tokens
                await rig.fake.until(texts.done)
                assert "".join(texts.result()) == whole.choices[0].text

    asyncio.run(main())


async def _texts(stream: Any) -> list[str]:
    return [chunk.choices[0].text async for chunk in stream]


def test_small_writes_are_not_held_back(start: Start):
    async def main():
        async with start() as rig:
            with connect(rig):
                while not connections(rig):
                    await asyncio.sleep(0.001)
                [connection] = connections(rig)
                ours = connection.transport.get_extra_info("socket")
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"x" * (1 << 18), b"\r\n" * 5000]
)
def test_what_is_no_http_ends_the_connection(start: Start, sent: bytes):
    async def main():
        async with start() as rig:
            with connect(rig) as client, contextlib.suppress(ConnectionError):
                await asyncio.get_running_loop().sock_sendall(client, sent + b"\r\n\r\n")
                answer = await until_closed(client)
                if answer:
                    refusal = answer[answer.index(b"HTTP/1.1 400") :]
                    error = json.loads(refusal.partition(b"\r\n\r\n")[2])["error"]
                    assert error["type"] == "invalid_request_error"
            assert await still_serves(rig)

    asyncio.run(main())


def test_nothing_that_a_client_sends_is_a_line_of_the_log(
    start: Start, caplog: pytest.LogCaptureFixture
):
    upgrade = (
        b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    )

    async def main():
        async with start() as rig:
            for sent, end in ((b"\x16\x03\x01\r\n\r\n", b"}"), (upgrade, b"200 OK")):
                with connect(rig) as client:
                    client.send(sent)
                    await until_received(client, end)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert caplog.records == []


def test_a_vanished_client_aborts(start: Start):

    async def main():
        async with start() as rig:
            client = connect(rig)
            client.send(http_bytes("/v1/completions", {"prompt": [5], "max_tokens": 60}))
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            client.close()
            await rig.fake.until(lambda: rig.fake.aborted == [FinishReason.ABORT], stepping=False)

    asyncio.run(main())


async def until_connected(rig: Rig, number: int) -> None:
    async with asyncio.timeout(60):
        while len(connections(rig)) != number:
            await asyncio.sleep(0.001)


LONG = {"prompt": [5], "max_tokens": 60, "stream": True}


def test_more_connections_than_allowed_are_told_so_and_how_the_server_is(start: Start):
    async def main():
        async with start(max_calls=3) as rig, contextlib.AsyncExitStack() as stack:
            busy = [stack.enter_context(connect(rig)) for _ in range(3)]
            for client in busy:
                client.send(http_bytes("/v1/completions", LONG))
            await rig.fake.until(lambda: len(rig.fake.running) == 3, stepping=False)
            for _ in range(5):  # each leaves
                async with httpx2.AsyncClient(base_url=rig.url, timeout=60) as late:
                    refused = await late.get("/version")
                    assert refused.status_code == 503
                    assert refused.json()["error"]["type"] == "service_unavailable_error"
                    assert refused.headers["retry-after"]
                    assert refused.headers["connection"] == "close"
                    health = asyncio.ensure_future(late.get("/health"))
                    await rig.fake.until(health.done, stepping=False)
                    assert health.result().status_code == 200
                    assert (await late.get("/dashboard")).status_code == 200
            await until_connected(rig, 3)
            late = [stack.enter_context(connect(rig)) for _ in range(4)]
            with contextlib.suppress(ConnectionResetError):
                assert await until_closed(late[0]) == b""  # the newest one has its place
            await until_connected(rig, 6)
            for client in busy:
                ended = asyncio.ensure_future(until_received(client, b"[DONE]"))
                await rig.fake.until(ended.done)
                client.send(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert b"200 OK" in await until_received(client, b'"}')

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", http_bytes("/v1/completions", LONG)[:-3]])
def test_one_host_cannot_keep_others_out_with_connections_that_it_does_not_use(
    start: Start, sent: bytes
):
    async def main():
        async with start(max_calls=4) as rig, contextlib.AsyncExitStack() as stack:
            host = {"local_address": "127.0.0.2"}
            transport = httpx2.AsyncHTTPTransport(**host)
            other = httpx2.AsyncClient(base_url=rig.url, transport=transport, timeout=60)
            await stack.enter_async_context(other)
            busy = stack.enter_context(connect(rig))
            busy.send(http_bytes("/v1/completions", LONG))
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            idle = [stack.enter_context(connect(rig)) for _ in range(20)]
            for client in idle:
                with contextlib.suppress(ConnectionError):
                    client.send(sent)
            await until_connected(rig, 4)
            for path in ("/version", "/health"):
                answer = await while_serving(rig, other.get(path))
                assert answer.status_code == 200
            assert len(connections(rig)) == 4
            ended = asyncio.ensure_future(until_received(busy, b"[DONE]"))
            await rig.fake.until(ended.done)
            assert await still_serves(rig)  # this host, too

    asyncio.run(main())


def test_all_addresses_of_an_ipv6_network_are_one_host(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    addresses = iter(["2001:db8::1", "2001:db8::2:2"])
    peer = "uvicorn.protocols.http.h11_impl.get_remote_addr"
    monkeypatch.setattr(peer, lambda _: (next(addresses), 1))

    async def main():
        async with start() as rig:
            with connect(rig), connect(rig):
                await until_connected(rig, 2)
                assert len({connection.host for connection in connections(rig)}) == 1

    asyncio.run(main())


def test_bodies_that_are_being_read_have_a_bound_in_sum(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app_module, "_HELD_BYTES", 5000)
    monkeypatch.setattr(app_module, "_HELD_BODIES", 0)
    monkeypatch.setattr(app_module, "_SMALL_BYTES", 1000)
    small = http_bytes("/v1/completions", {"prompt": "Hi", "max_tokens": 1})
    whole = http_bytes("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "user": "x" * 3000})

    async def main():
        async with start() as rig, contextlib.AsyncExitStack() as stack:
            slow, late = (stack.enter_context(connect(rig)) for _ in range(2))
            slow.send(whole[:-3])
            await until_held(rig, 2900)
            late.send(whole)
            answer = await until_received(late, b"}}")
            assert answer.startswith(b"HTTP/1.1 429")
            for piece in (whole[-3:], whole, whole, small):
                if piece is small:
                    routes_of(rig)._max_held_bytes = 0
                slow.send(piece)
                answered = asyncio.ensure_future(until_received(slow, b'"usage"'))
                await rig.fake.until(answered.done)
                assert answered.result().startswith(b"HTTP/1.1 200")

    asyncio.run(main())


async def until_held(rig: Rig, number: int) -> None:
    """Bytes of bodies that are being read."""
    async with asyncio.timeout(60):
        while routes_of(rig)._num_held_bytes < number:
            await asyncio.sleep(0.001)


def routes_of(rig: Rig) -> app_module.Routes:
    route = rig.front_end._http._server.config.app._app.routes[0]  # pyright: ignore
    return inspect.getclosurevars(route.endpoint).nonlocals["handler"].__self__


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("127.1.2.3", True),
        ("[::1]:8000", True),
        ("rebound.example", False),
        ("rebound.example:8000", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("", False),
    ],
)
def test_a_web_page_that_gives_its_name_to_this_machine_is_told_nothing(
    start: Start, host: str, is_ours: bool
):
    async def main():
        async with start() as rig:
            headers = {"host": host}
            for path in ("/v1/models", "/dashboard.json", "/metrics"):
                reply = await request(rig, "GET", path, headers=headers)
                assert reply.status_code == (200 if is_ours else 403)
            body = {"prompt": "Hi", "max_tokens": 1}
            reply = await request(rig, "POST", "/v1/completions", json=body, headers=headers)
            assert reply.status_code == (200 if is_ours else 403)
            assert (await request(rig, "GET", "/health", headers=headers)).status_code == 200

    asyncio.run(main())


def test_who_has_a_key_may_use_any_name(start: Start):
    async def main():
        async with start(settings=Settings(port=0, http_port=0, api_keys=("key",))) as rig:
            headers = {"host": "rebound.example", "authorization": "Bearer key"}
            reply = await request(rig, "GET", "/v1/models", headers=headers)
            assert reply.status_code == 200

    asyncio.run(main())


def test_a_connection_that_is_no_http_any_more_can_be_shut_down(start: Start):
    async def main():
        async with start() as rig:
            with connect(rig) as client:
                client.send(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
                await until_received(client, b"}")
                [connection] = connections(rig)
                with pytest.raises(h11.LocalProtocolError):
                    connection.conn.send(h11.Data(data=b"x"))
                connection.shutdown()
                assert await until_closed(client) == b""

    asyncio.run(main())


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ raise_exception('no') }}",
    "{{ undefined_function() }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_chat_template_is_an_error_and_runs_nothing(
    run_dir: str, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(save_byte_level(tmp_path / "model", chat_template=template))

    async def main():
        async with serving(run_dir, tokenizer) as rig:
            body = {"messages": [{"role": "user", "content": "x"}]}
            reply = await request(rig, "POST", "/v1/chat/completions", json=body)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "messages"
            assert rig.fake.submitted == []
            assert await still_serves(rig)

    asyncio.run(main())
    assert not (tmp_path / "MARK").exists()
