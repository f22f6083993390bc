import asyncio
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from server_rig import Rig, Start, read_all

from semipd_jax.errors import StartupError
from semipd_server.control_client import ControlClient
from semipd_server.front_end import FrontEnd
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.server import SERVICE
from semipd_server.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), **fields)


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def begun(rig: Rig, call: Any) -> None:
    """Waits for the first event; no step is made."""
    first = asyncio.ensure_future(call.read())
    await rig.fake.until(first.done, stepping=False)


async def rest_of(rig: Rig, call: Any) -> list[pb.GenerateResponse]:
    reader = asyncio.ensure_future(read_all(call))
    await rig.fake.until(reader.done)
    return reader.result()


def test_before_there_is_an_engine_health_says_so_and_calls_are_refused():
    async def main():
        server = FrontEnd(Settings(port=0), max_model_len=64, max_calls=10)
        address, _ = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            for service in ("", SERVICE):
                assert await health_of(channel, service) == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await health_of(channel, "no.such.Service")
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
            stub: Any = pb_grpc.InferenceServiceStub(channel)
            for call in (
                stub.Generate(request()).read(),
                stub.Abort(pb.AbortRequest(request_id="x")),
                stub.Tokenize(pb.TokenizeRequest(text="x")),
                stub.Detokenize(pb.DetokenizeRequest(ids=[5])),
                stub.GetModelInfo(pb.GetModelInfoRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
                assert raised.value.details() == "the engine is starting"
        await server.stop()

    asyncio.run(main())


def test_health_follows_the_servers_life(start: Start):
    async def main():
        async with start() as rig:
            stub: Any = health_pb2_grpc.HealthStub(rig.channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
            assert (await watch.read()).status == SERVING
            for service in ("", SERVICE):
                assert await health_of(rig.channel, service) == SERVING
            call = rig.stub.Generate(request(request_id="last"))
            await begun(rig, call)
            draining = asyncio.ensure_future(rig.front_end.drain(60))
            assert (await watch.read()).status == NOT_SERVING
            for service in ("", SERVICE):
                assert await health_of(rig.channel, service) == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await rig.stub.Generate(request()).read()
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert raised.value.details() == "the server is shutting down"
            assert not draining.done()
            assert (await rest_of(rig, call))[-1].WhichOneof("event") == "finished"
            await asyncio.wait_for(draining, 60)

    asyncio.run(main())


def test_while_draining_the_engine_is_still_watched_and_requests_aborted(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request(request_id="long"))
            await begun(rig, call)
            draining = asyncio.ensure_future(rig.front_end.drain(600))
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                await rig.stub.Tokenize(pb.TokenizeRequest(text="x"))
            metrics = (await get(rig, "/metrics")).text
            assert 'semipd:num_requests_running{engine="0",model_name="tiny"} 1.0' in metrics
            assert "semipd:up 0.0" in metrics
            seen = (await get(rig, "/dashboard.json")).json()
            assert (seen["problem"], seen["model"]) == ("the server is shutting down", "tiny")
            assert seen["engine"]["running"] == 1
            with ControlClient(rig.control) as control:
                asked = asyncio.ensure_future(asyncio.to_thread(control.partition))
                await rig.fake.until(asked.done, stepping=False)
            assert asked.result().policy == "static"
            await rig.stub.Abort(pb.AbortRequest(request_id="long"))
            await rig.fake.until(lambda: bool(rig.fake.aborted), stepping=False)
            rest = await rest_of(rig, call)
            assert rest[-1].finished.reason == pb.FINISH_REASON_ABORT
            await asyncio.wait_for(draining, 60)

    asyncio.run(main())


async def get(rig: Rig, path: str) -> httpx2.Response:
    """What HTTP answers, while the coordinator answers but makes no step."""
    async with httpx2.AsyncClient(base_url=rig.url, timeout=60) as client:
        reply = asyncio.ensure_future(client.get(path))
        await rig.fake.until(reply.done, stepping=False)
        return reply.result()


def test_draining_takes_no_longer_than_allowed(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request())
            await begun(rig, call)
            await asyncio.wait_for(rig.front_end.drain(0.05), 60)
            assert len(rig.fake.running) == 1
            call.cancel()

    asyncio.run(main())


def test_stopping_tells_every_stream_why(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("semipd_server.server._FLUSH_S", 60.0)

    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request())
            await begun(rig, call)
            await rig.engine.close()
            await rig.front_end.stop()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read_all(call)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert raised.value.details() == "the engine client was closed"

    asyncio.run(main())


def test_reflection_lists_every_service(start: Start):
    async def main():
        async with start() as rig:
            return await asyncio.to_thread(reflected, rig.address)

    names, methods = asyncio.run(main())
    assert {SERVICE, "grpc.health.v1.Health"} <= set(names)
    assert methods == {"Generate", "Abort", "Tokenize", "Detokenize", "GetModelInfo"}


def reflected(address: str) -> tuple[list[str], set[str]]:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        file = database.FindFileContainingSymbol(SERVICE)
        methods = {method.name for service in file.service for method in service.method}
        return list(database.get_services()), methods


def test_a_taken_port_is_a_clear_error():
    async def main():
        first = FrontEnd(Settings(port=0, http_port=0), max_model_len=64, max_calls=10)
        address, url = await first.start()
        port, http_port = (int(a.rsplit(":", 1)[1]) for a in (address, url))
        for settings, text in (
            (Settings(port=port), f"cannot listen on 127.0.0.1:{port}"),
            (Settings(port=0, http_port=http_port), f"127.0.0.1:{http_port} .http_port."),
        ):
            second = FrontEnd(settings, max_model_len=64, max_calls=10)
            with pytest.raises(StartupError, match=text):
                await second.start()
            await second.stop()
        await first.stop()

    asyncio.run(main())
