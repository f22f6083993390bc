"""Calls that stay open as long as their client likes: health watches and reflection."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from server_rig import Rig, Start

from semipd_jax.errors import OverloadedError
from semipd_server import health, open_calls, patience, reflection
from semipd_server.open_calls import OpenCalls
from semipd_server.pb import inference_pb2 as pb
from semipd_server.server import SERVICE
from semipd_server.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING


def watch(rig: Rig, service: str = "") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(rig.channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service))


async def is_serving(rig: Rig) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(rig.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status == SERVING


def ask(rig: Rig) -> Any:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(rig.channel)
    return stub.ServerReflectionInfo()


async def answer_to(call: Any) -> list[str]:
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer: Any = await call.read()
    return [service.name for service in answer.list_services_response.service]


async def next_error(call: Any) -> grpc.aio.AioRpcError:
    """What a stream says next."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call.read(), 30)
    return raised.value


def test_hosts_share_the_places_of_open_calls():
    async def main():
        calls = OpenCalls("calls", most=3)
        ended: list[str] = []

        async def hold(host: str, name: str) -> None:
            try:
                async with calls.one_more(f"ipv4:{host}:1"):
                    await asyncio.Event().wait()
            except OverloadedError as error:
                ended.append(f"{name}: {error}")

        async def come(host: str, name: str) -> asyncio.Task[None]:
            task = asyncio.create_task(hold(host, name))
            for _ in range(10):  # turns of the loop: nothing here waits for anything else
                await asyncio.sleep(0)
            return task

        tasks = [await come("10.0.0.1", name) for name in ("a", "b", "c")]
        assert ended == []
        tasks.append(await come("10.0.0.1", "own"))
        assert ended == ["own: too many calls are open; allowed: 3 in all"]
        tasks.append(await come("10.0.0.2", "other"))
        assert ended[1].startswith("a: too many calls are open, and most of them are of this host")
        tasks.append(await come("10.0.0.2", "as many"))
        assert ended[2:] == ["as many: too many calls are open; allowed: 3 in all"]
        tasks[1].cancel()
        await asyncio.wait((tasks[1],))
        tasks.append(await come("10.0.0.1", "again"))
        assert len(ended) == 3
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(main())


def test_a_health_watch_that_makes_room_is_told_so(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "_MAX_WATCHES", 2)

    async def main():
        async with start() as rig:
            watches: list[Any] = []
            for _ in range(2):
                watches.append(watch(rig))
                assert (await watches[-1].read()).status == SERVING
            monkeypatch.setattr(open_calls, "grpc_host", lambda _: ("10.0.0.9", "1"))
            other = watch(rig)
            assert (await other.read()).status == SERVING
            error = await next_error(watches[0])
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "made room for another host" in (error.details() or "")
            for open_one in (*watches, other):
                open_one.cancel()

    asyncio.run(main())


def test_a_service_that_does_not_exist_is_not_watched(start: Start):
    async def main():
        async with start() as rig:
            error = await next_error(watch(rig, "no.such.Service"))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert f"service is 'no.such.Service'; allowed: '', '{SERVICE}'" in error.details()

    asyncio.run(main())


@pytest.mark.parametrize(
    "message",
    [
        health_pb2.HealthCheckRequest(service="x" * 1000).SerializeToString(),
        b"\x0a\x00" * 500,  # the field, empty, again and again
        b"\x7a\x00" * 500,  # a field that nobody knows
    ],
)
@pytest.mark.parametrize("method", sorted(health.METHODS))
def test_a_long_question_about_health_is_refused(start: Start, method: str, message: bytes):
    async def main():
        async with start() as rig:
            error = await next_error(rig.channel.unary_stream(method)(message))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_health_watches_have_a_bound_and_take_nobodys_place(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(health, "_MAX_WATCHES", 2)

    async def main():
        async with start(max_calls=2) as rig:
            watches = [watch(rig), watch(rig)]
            for open_one in watches:
                assert (await open_one.read()).status == SERVING
            error = await next_error(watch(rig))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "too many health watches are open" in error.details()
            retry, status = error_details_pb2.RetryInfo(), rpc_status.from_call(error)
            assert status is not None
            assert status.details[0].Unpack(retry)
            assert await is_serving(rig), "who checks is answered"
            assert await rig.stub.GetModelInfo(pb.GetModelInfoRequest())
            watches.pop().cancel()
            ended = rig.front_end.gate.calls.ended
            await rig.fake.until(
                lambda: ended["/grpc.health.v1.Health/Watch", "CANCELLED"] == 1, stepping=False
            )
            watches.append(watch(rig))
            assert (await watches[-1].read()).status == SERVING
            for open_one in watches:
                open_one.cancel()

    asyncio.run(main())


def test_streams_that_ask_nothing_are_ended(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "NEXT_S", 5.0)

    async def main():
        async with start() as rig:
            never, once = ask(rig), ask(rig)
            assert SERVICE in await answer_to(once)
            for call in (never, once):
                error = await next_error(call)
                assert error.code() is grpc.StatusCode.ABORTED
                assert "nothing was asked" in error.details()

    asyncio.run(main())


def test_reflection_has_a_bound_and_takes_nobodys_place(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reflection, "_MAX_STREAMS", 2)

    async def main():
        async with start(max_calls=2) as rig:
            streams = [ask(rig), ask(rig)]
            for call in streams:
                assert SERVICE in await answer_to(call)
            error = await next_error(ask(rig))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "too many reflection streams are open" in error.details()
            assert await rig.stub.GetModelInfo(pb.GetModelInfoRequest())
            for call in streams:
                await call.done_writing()
                assert await call.code() is grpc.StatusCode.OK

    asyncio.run(main())


def test_a_damaged_question_is_its_clients_fault(start: Start):
    async def main():
        async with start() as rig:
            call = rig.channel.stream_stream(reflection.METHOD)(iter([b"\xff"]))
            assert (await next_error(call)).code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_reflection_can_be_turned_off(start: Start):
    async def main():
        async with start(settings=Settings(port=0, reflection=False)) as rig:
            assert (await next_error(ask(rig))).code() is grpc.StatusCode.UNIMPLEMENTED
            assert await is_serving(rig)

    asyncio.run(main())
