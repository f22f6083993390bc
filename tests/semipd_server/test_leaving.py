"""Streams that their client ends."""

import asyncio
from functools import partial
from typing import Any

import grpc
import pytest
from server_rig import Rig, Start, read_all
from servicer_rig import request, responses, running

from semipd_jax.request import FinishReason
from semipd_server.pb import inference_pb2 as pb


def test_cancelling_the_call_aborts_within_a_step(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request())
            await running(rig, call)
            call.cancel()
            await rig.fake.until(lambda: rig.fake.aborted == [FinishReason.ABORT], stepping=False)
            assert rig.fake.running == {}

    asyncio.run(main())


def test_a_vanished_client_aborts_its_requests(start: Start):
    async def main():
        async with start() as rig, grpc.aio.insecure_channel(rig.address) as channel:
            generate = channel.unary_stream(
                "/semipd.v1.InferenceService/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            calls = [generate(request()), generate(request())]
            for call in calls:
                await running(rig, call)
            await channel.close()
            await rig.fake.until(lambda: len(rig.fake.aborted) == 2, stepping=False)

    asyncio.run(main())


async def arrived(rig: Rig, timeout_s: float) -> Any:
    """A call that the coordinator got before its deadline, at the first try or a later one."""
    while True:
        call = rig.stub.Generate(request(), timeout=timeout_s)
        await rig.fake.until(partial(_is_over, rig, call), stepping=False)
        if rig.fake.running:
            return call


def _is_over(rig: Rig, call: Any) -> bool:
    return bool(rig.fake.running) or call.done()


@pytest.mark.parametrize("admitted", [True, False])
def test_a_deadline_ends_the_request_in_the_queue_and_while_running(start: Start, admitted: bool):
    async def main():
        async with start(admits=admitted) as rig:
            call = await arrived(rig, timeout_s=1.5)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read_all(call)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            fake = rig.fake
            await fake.until(lambda: bool(fake.aborted) and not fake.running, stepping=False)
            assert set(fake.aborted) == {FinishReason.ABORT}

    asyncio.run(main())


def test_abort_from_another_call_ends_the_stream_with_its_reason(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request(request_id="stop me"))
            await running(rig, call)
            await rig.stub.Abort(pb.AbortRequest(request_id="stop me"))
            await rig.fake.until(lambda: bool(rig.fake.aborted), stepping=False)
            events = await responses(rig, call)
            assert events[-1].finished.reason == pb.FINISH_REASON_ABORT
            assert await call.code() is grpc.StatusCode.OK

    asyncio.run(main())
