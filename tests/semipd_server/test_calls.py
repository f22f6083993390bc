"""Calls that are counted, and calls that are repeated."""

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai_rig import request, while_serving
from server_rig import INFO, Rig, Start, read_all

from semipd_jax.config import SchedulerConfig
from semipd_jax.errors import RequestFailedError, UnavailableError
from semipd_server.client import AsyncClient
from semipd_server.gate import Engine
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.settings import Settings

GENERATE = "/semipd.v1.InferenceService/Generate"


def generate(rig: Rig, *, timeout: float | None = None, **sampling: Any) -> Any:
    message = pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(**sampling))
    return rig.stub.Generate(message, timeout=timeout)


async def end(rig: Rig, call: Any, *, stepping: bool = True) -> None:
    reading = asyncio.ensure_future(read_all(call))
    await rig.fake.until(reading.done, stepping=stepping)
    reading.exception()


async def until_ended(rig: Rig, calls: dict[tuple[str, str], int]) -> None:
    """A client may know of an end before it is counted."""
    await rig.fake.until(lambda: ended(rig).total() >= sum(calls.values()), stepping=False)
    assert ended(rig) == calls


def ended(rig: Rig) -> Counter[tuple[str, str]]:
    return rig.front_end.gate.calls.ended


def test_calls_are_counted_by_how_they_end(start: Start):
    async def main():
        async with start() as rig:
            await end(rig, generate(rig, max_tokens=2))
            await end(rig, generate(rig, temperature=-1.0))
            late = generate(rig, max_tokens=50, timeout=5.0)
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            time.sleep(5.2)  # the server must not hear that its client left before it is late
            await end(rig, late, stepping=False)
            await rig.fake.until(lambda: ended(rig).total() == 3, stepping=False)
            call = generate(rig, max_tokens=50)
            first = asyncio.ensure_future(call.read())
            await rig.fake.until(first.done, stepping=False)
            assert rig.front_end.gate.calls.num_running == 1
            call.cancel()
            await rig.fake.until(lambda: ended(rig)[GENERATE, "CANCELLED"] == 1, stepping=False)
            health: Any = health_pb2_grpc.HealthStub(rig.channel)
            await health.Check(health_pb2.HealthCheckRequest())
            made_up = rig.channel.unary_unary("/made.up.Service/Method")
            with pytest.raises(grpc.aio.AioRpcError):
                await made_up(b"")
            calls = {
                (GENERATE, "OK"): 1,
                (GENERATE, "INVALID_ARGUMENT"): 1,
                (GENERATE, "DEADLINE_EXCEEDED"): 1,
                (GENERATE, "CANCELLED"): 1,
                ("/grpc.health.v1.Health/Check", "OK"): 1,
                ("unknown", "UNIMPLEMENTED"): 1,
            }
            await until_ended(rig, calls)
            assert rig.front_end.gate.calls.num_running == 0
            text = (await request(rig, "GET", "/metrics")).text
            assert 'method="/semipd.v1.InferenceService/Generate",model_name="tiny"' in text
            assert "made.up" not in text

    asyncio.run(main())


def test_refused_calls_are_counted_too(start: Start):
    async def main():
        async with start(settings=Settings(port=0, http_port=0, api_keys=("k",))) as rig:
            await end(rig, generate(rig))
            made_up = rig.channel.unary_unary("/made.up.Service/Method")
            with pytest.raises(grpc.aio.AioRpcError):
                await made_up(b"")
            calls = {(GENERATE, "UNAUTHENTICATED"): 1, ("unknown", "UNIMPLEMENTED"): 1}
            await until_ended(rig, calls)

    asyncio.run(main())


def test_a_call_that_finds_no_engine_is_repeated_until_there_is_one(start: Start):
    async def main():
        async with start() as rig:
            rig.front_end.gate.close("the engine is starting")
            working = asyncio.ensure_future(rig.client.complete("Hi", max_tokens=2))
            await rig.fake.until(lambda: ended(rig)[GENERATE, "UNAVAILABLE"] == 1)
            rig.front_end.gate.open(Engine(rig.engine, INFO, SchedulerConfig()))
            assert await while_serving(rig, working)
            assert len(rig.fake.submitted) == 1

    asyncio.run(main())


def test_without_retries_a_call_fails_at_once(start: Start):
    async def main():
        async with start() as rig, AsyncClient(rig.address, retries=0) as client:
            rig.front_end.gate.close("the engine is starting")
            with pytest.raises(UnavailableError):
                await client.complete("Hi", max_tokens=2)
            await until_ended(rig, {(GENERATE, "UNAVAILABLE"): 1})

    asyncio.run(main())


def test_an_abort_is_not_repeated():
    """Its answer may be lost, and then there would be nothing more to abort."""
    codes = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND]

    class Servicer(pb_grpc.InferenceServiceServicer):
        async def Abort(self, request, context) -> None:  # noqa: N802
            await context.abort(codes.pop(0), "")

    async def main():
        server = grpc.aio.server()
        pb_grpc.add_InferenceServiceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                with pytest.raises(UnavailableError):
                    await client.abort("mine")
        finally:
            await server.stop(None)
        assert len(codes) == 1

    asyncio.run(main())


def test_what_was_answered_in_part_is_not_repeated(start: Start):
    async def main():
        async with start(fail_after=2) as rig:
            with pytest.raises(RequestFailedError):
                await while_serving(rig, rig.client.complete("Hi", max_tokens=9))
            assert len(rig.fake.submitted) == 1

    asyncio.run(main())


@pytest.mark.parametrize("retries", [-1, 5])
def test_retries_have_bounds(retries: int):
    with pytest.raises(ValueError, match=f"retries is {retries}; allowed: 0 to 4"):
        AsyncClient("localhost:1", retries=retries)
