"""Hosts that disappear: the connection stays open, nothing comes from it any more."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from itertools import batched
from typing import Any

import grpc
import pytest
from openai_rig import http_bytes, request, while_serving
from server_rig import Rig, Start

from benchmarks.half_open import vanish
from semipd_jax.errors import UnavailableError
from semipd_jax.request import FinishReason
from semipd_server import control_client, patience
from semipd_server.control_client import ControlClient
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.settings import Settings

GENERATE = "/semipd.v1.InferenceService/Generate"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is the least that the kernel can be told."""
    monkeypatch.setattr(patience, "PROBE_AFTER_S", 1)
    monkeypatch.setattr(patience, "PROBE_ANSWER_S", 1)


async def still_serves(rig: Rig) -> bool:
    assert await while_serving(rig, rig.client.complete("Hi", max_tokens=2))
    body = {"prompt": "Hi", "max_tokens": 1}
    return (await request(rig, "POST", "/v1/completions", json=body)).status_code == 200


async def until_given_up(rig: Rig, count: int = 1) -> None:
    """The coordinator is told to end what the client wanted, and takes pages and rows back."""
    await rig.fake.until(lambda: rig.fake.aborted == [FinishReason.ABORT] * count, stepping=False)
    assert rig.fake.running == {}


# ---------------------------------------------------------------- HTTP


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("is_streaming", [False, True])
def test_an_http_client_that_vanished_loses_its_request(start: Start, is_streaming: bool):
    """Whether nothing is sent to it, or what is sent is never acknowledged."""
    body = {"prompt": [5], "max_tokens": 60, "stream": is_streaming}

    async def main():
        async with start() as rig:
            with connect(rig.url) as client:
                client.sendall(http_bytes("/v1/completions", body))
                await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
                vanish(client)
                if is_streaming:
                    rig.fake.step()
                await until_given_up(rig)
            assert await still_serves(rig)

    asyncio.run(main())


def test_an_http_client_that_is_only_silent_keeps_its_request(start: Start):
    async def main():
        async with start(admits=False) as rig:
            with connect(rig.url) as client:
                client.sendall(http_bytes("/v1/completions", {"prompt": [5], "max_tokens": 2}))
                await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
                silence = asyncio.ensure_future(asyncio.sleep(4 * patience.PROBE_AFTER_S))
                await rig.fake.until(silence.done, stepping=False)
                assert rig.fake.aborted == []
                answered = asyncio.ensure_future(asyncio.to_thread(client.recv, 100))
                await rig.fake.until(answered.done)
                assert answered.result().startswith(b"HTTP/1.1 200")

    asyncio.run(main())


# ---------------------------------------------------------------- gRPC


class Way:
    """A TCP connection from a gRPC client to a server that passes through here and can be cut
    without a word."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ends: list[Any] = []  # the sockets here
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def lay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = connect(self._address)
        from_server, to_server = await asyncio.open_connection(sock=onward)
        self._ends = [writer.get_extra_info("socket"), onward]
        self._writers = [writer, to_server]
        self._pumps = [
            asyncio.create_task(_pump(reader, to_server)),
            asyncio.create_task(_pump(from_server, writer)),
        ]

    def block(self, *, is_host_gone: bool) -> None:
        """Nothing passes any more, either way; both halves stay open."""
        for pump in self._pumps:
            pump.cancel()
        if is_host_gone:
            for end in self._ends:
                vanish(end)

    async def close(self) -> None:
        self.block(is_host_gone=False)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)


@asynccontextmanager
async def way_to(server: str) -> AsyncIterator[tuple[Way, str]]:
    """And the address at which it begins."""
    way = Way(server)
    proxy = await asyncio.start_server(way.lay, "127.0.0.1", 0)
    try:
        yield way, f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    finally:
        await way.close()
        proxy.close()


@asynccontextmanager
async def through(rig: Rig) -> AsyncIterator[tuple[Way, Any]]:
    """And a stub whose calls take it."""
    async with way_to(rig.address) as (way, address), grpc.aio.insecure_channel(address) as channel:
        yield way, pb_grpc.InferenceServiceStub(channel)


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("is_host_gone", [False, True])
def test_a_grpc_client_that_vanished_loses_its_requests(
    start: Start, is_running: bool, is_host_gone: bool
):
    """Whether its kernel still acknowledges what nobody reads, or nothing does."""

    async def main():
        async with start(admits=is_running) as rig:
            async with through(rig) as (way, stub):
                sampling = pb.SamplingParams(max_tokens=60, ignore_eos=True)
                calls = [
                    stub.Generate(pb.GenerateRequest(text="Hi", sampling=sampling))
                    for _ in range(2)
                ]
                await rig.fake.until(lambda: len(rig.fake.running) == 2, stepping=False)
                way.block(is_host_gone=is_host_gone)
                if is_running:
                    rig.fake.step()
                await until_given_up(rig, 2)
                ended = rig.front_end.gate.calls.ended
                await rig.fake.until(lambda: ended[GENERATE, "CANCELLED"] == 2, stepping=False)
                for call in calls:
                    call.cancel()
            assert await still_serves(rig)

    asyncio.run(main())


def test_a_grpc_client_that_is_only_silent_keeps_its_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patience, "PROBE_ANSWER_S", 5)  # it does answer, but may be starved

    async def main():
        async with start(admits=False) as rig, through(rig) as (_, stub):
            call = stub.Generate(pb.GenerateRequest(text="Hi"))
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            patience_s = patience.PROBE_AFTER_S + patience.PROBE_ANSWER_S
            silence = asyncio.ensure_future(asyncio.sleep(1.25 * patience_s))
            await rig.fake.until(silence.done, stepping=False)
            assert rig.fake.aborted == []
            call.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("is_host_gone", [False, True])
def test_a_watch_of_a_server_that_vanished_ends(
    start: Start, monkeypatch: pytest.MonkeyPatch, is_host_gone: bool
):
    """Whether its kernel still acknowledges what nobody reads, or nothing does."""
    impatient = dict.fromkeys(dict(control_client.KEEPALIVE), 1000)
    impatient["grpc.http2.max_pings_without_data"] = 0  # else it may be one a minute
    monkeypatch.setattr(control_client, "KEEPALIVE", tuple(impatient.items()))
    settings = Settings(port=0, expose_control=True, api_keys=("secret",))

    async def main():
        async with start(settings=settings) as rig, way_to(rig.address) as (way, address):
            with ControlClient(address, api_key="secret") as client:
                watch = client.watch(interval_ms=100)
                seen = asyncio.ensure_future(asyncio.to_thread(next, watch))
                await rig.fake.until(seen.done)
                assert seen.result().pages.free == 100
                way.block(is_host_gone=is_host_gone)
                rest = asyncio.ensure_future(asyncio.to_thread(list, watch))
                await rig.fake.until(rest.done)
                with pytest.raises(UnavailableError):
                    rest.result()

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n"])
def test_a_connection_that_never_speaks_grpc_is_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes
):
    monkeypatch.setattr(patience, "FIRST_WORD_S", 2.0)
    monkeypatch.setattr(patience, "PROBE_AFTER_S", 60)  # which would close it, too

    async def main():
        async with start() as rig:
            with connect(rig.address) as client:
                client.sendall(sent)
                assert await asyncio.to_thread(_until_closed, client)
            monkeypatch.setattr(patience, "FIRST_WORD_S", 600.0)
            assert await still_serves(rig)

    asyncio.run(main())


def _until_closed(client: socket.socket) -> bool:
    with suppress(ConnectionResetError):
        while client.recv(1 << 16):
            pass
    return True


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2."""
    return struct.pack(">BHBBL", 0, len(payload), kind, flags, stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)


def beginning_of_a_call(message: bytes) -> bytes:
    """What a client sends until it stops in the middle of its message."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": GENERATE,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    fields = [text.encode() for pair in headers.items() for text in pair]
    literals = [bytes((len(field),)) + field for field in fields]
    packed = b"".join(b"\0" + name + value for name, value in batched(literals, 2))
    return (
        PREFACE
        + frame(1, 4, 1, packed)
        + frame(0, 0, 1, struct.pack(">BL", 0, len(message) + 1) + message)
    )


def test_a_message_that_never_ends_ends_its_call(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "PROBE_ANSWER_S", 600)  # which would end it, too
    monkeypatch.setattr(patience, "BODY_S", 2.0)

    async def main():
        async with start() as rig:
            with connect(rig.address) as client:
                client.sendall(beginning_of_a_call(b"\x0a\x02H"))
                silent = rig.channel.stream_stream(GENERATE)()
                with pytest.raises(grpc.aio.AioRpcError, match="longer than 2 s") as raised:
                    await asyncio.wait_for(silent.read(), 30)
                assert raised.value.code() is grpc.StatusCode.ABORTED
                ended = rig.front_end.gate.calls.ended
                await rig.fake.until(lambda: ended[GENERATE, "ABORTED"] == 2, stepping=False)
            monkeypatch.setattr(patience, "BODY_S", 60.0)
            assert await still_serves(rig)

    asyncio.run(main())


def test_an_idle_grpc_connection_is_closed_and_its_client_connects_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patience, "PROBE_ANSWER_S", 600)
    monkeypatch.setattr(patience, "IDLE_S", 1.0)

    async def main():
        async with start() as rig:
            assert await rig.stub.GetModelInfo(pb.GetModelInfoRequest())
            async with asyncio.timeout(30):
                while (state := rig.channel.get_state()) is grpc.ChannelConnectivity.READY:
                    await rig.channel.wait_for_state_change(state)
            assert await rig.stub.GetModelInfo(pb.GetModelInfoRequest())
            with connect(rig.address) as client:
                client.sendall(PREFACE)
                assert await asyncio.to_thread(_until_closed, client)
            assert await still_serves(rig)

    asyncio.run(main())


def test_grpc_connections_have_a_bound(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "PROBE_AFTER_S", 600)  # these would close them, too
    monkeypatch.setattr(patience, "FIRST_WORD_S", 600.0)

    async def main():
        async with start(max_calls=3) as rig:
            with ExitStack() as stack:
                clients = [stack.enter_context(connect(rig.address)) for _ in range(9)]
                for client in clients[6:]:
                    assert await asyncio.to_thread(_until_closed, client)

    asyncio.run(main())
