"""Very many clients at once, and clients that leave all together."""

import asyncio
import random
from typing import Any, cast

import grpc
import pytest
from openai_rig import while_serving
from server_rig import Rig, Start

from semipd_jax.request import Delta, Event, Finished, FinishReason
from semipd_server import servicer
from semipd_server.client import AsyncClient
from semipd_server.convert import event_message
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc

NUM_STREAMS = 1000
NUM_TOKENS = 4
PATIENCE_S = 100.0


async def follow(client: AsyncClient, number: int) -> list[int]:
    """Tokens of one stream, and that it ended as it should."""
    prompt = [2 + number % 90, 5]
    events = client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
    seen = [event async for event in events]
    assert isinstance(seen[-1], Finished)
    return [t for event in seen if isinstance(event, Delta) for t in event.token_ids]


def test_a_thousand_streams_at_once(start: Start):
    async def main():
        async with start(max_calls=NUM_STREAMS + 100) as rig:
            clients = [AsyncClient(rig.address, retries=0) for _ in range(10)]
            streams = asyncio.gather(
                *(follow(clients[i % len(clients)], i) for i in range(NUM_STREAMS))
            )
            await rig.fake.until(
                lambda: len(rig.fake.running) == NUM_STREAMS, stepping=False, timeout_s=PATIENCE_S
            )
            await rig.fake.until(streams.done, timeout_s=PATIENCE_S)
            for number, tokens in enumerate(streams.result()):
                first = 2 + (2 + number % 90 + 5) % 95
                assert tokens[0] == first, "streams are mixed up"
                assert len(tokens) == NUM_TOKENS
            for client in clients:
                await client.close()

    asyncio.run(main())


def test_a_grpc_client_that_never_reads_loses_its_request_and_delays_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    def much(event: Event, request_id: str) -> pb.GenerateResponse:
        """More than the buffers between a server and its client hold."""
        message = event_message(event, request_id)
        if isinstance(event, Delta):
            message.delta.text = "x" * (1 << 18)
        return message

    monkeypatch.setattr(servicer, "event_message", much)
    monkeypatch.setattr(servicer, "_WRITE_TIMEOUT_S", 1.0)

    async def main():
        async with start() as rig:
            sampling = pb.SamplingParams(max_tokens=60, ignore_eos=True)
            stalled = rig.stub.Generate(pb.GenerateRequest(text="Hi", sampling=sampling))
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            async with AsyncClient(rig.address) as other:
                text = await while_serving(rig, other.complete("Hi", max_tokens=3))
            assert len(text) == 3 << 18
            for _ in range(30):
                rig.fake.step()
                await asyncio.sleep(0.01)  # so that tokens are not merged into one message
            assert rig.fake.running
            await rig.fake.until(lambda: not rig.fake.running, stepping=False)
            assert rig.fake.aborted == [FinishReason.ABORT]
            ended = rig.front_end.gate.calls.ended
            assert ended["/semipd.v1.InferenceService/Generate", "CANCELLED"] == 1
            stalled.cancel()

    asyncio.run(main())


def test_a_client_that_leaves_at_a_write_is_no_error_of_ours():
    class Left:
        async def write(self, message: Any) -> None:
            raise grpc.aio.InternalError("the batch failed")

    async def main():
        with pytest.raises(asyncio.CancelledError):
            await servicer.send(cast(Any, Left()), pb.GenerateResponse())

    asyncio.run(main())


async def leave(rig: Rig, channel: grpc.aio.Channel, rng: random.Random) -> None:
    """A call that is cancelled before, between or after its first messages."""
    stub: Any = pb_grpc.InferenceServiceStub(channel)
    sampling = pb.SamplingParams(max_tokens=50, ignore_eos=True)
    call = stub.Generate(pb.GenerateRequest(text="Hi", sampling=sampling))
    if rng.random() < 0.7:
        await call.read()
    if rng.random() < 0.5:
        await call.read()
    call.cancel()


def test_a_storm_of_cancels_leaves_nothing_behind(start: Start):
    async def main():
        rng = random.Random(0)
        async with start() as rig:
            for _ in range(3):
                async with grpc.aio.insecure_channel(rig.address) as channel:
                    calls = (leave(rig, channel, rng) for _ in range(100))
                    await while_serving(rig, asyncio.gather(*calls))
            await rig.fake.until(lambda: not rig.fake.running, stepping=False)
            assert not rig.engine._streams
            assert rig.front_end.gate.calls.num_running == 0
            assert await while_serving(rig, rig.client.complete("Hi", max_tokens=2))

    asyncio.run(main())
