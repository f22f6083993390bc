"""Very many clients at once, and clients that leave all together."""

import asyncio
import random
from typing import Any, cast

import grpc
import pytest
from openai_rig import while_serving
from server_rig import Rig, Start, read_all

from semipd_jax.request import Delta, Event, Finished, FinishReason
from semipd_server import patience, servicer
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


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few messages are more than the buffers between a server and its client hold; a client has
    five seconds to read one."""

    def much(event: Event, request_id: str) -> pb.GenerateResponse:
        message = event_message(event, request_id)
        if isinstance(event, Delta):
            message.delta.text = "x" * (1 << 20)
        return message

    monkeypatch.setattr(servicer, "event_message", much)
    monkeypatch.setattr(patience, "READ_S", 5.0)


async def step(rig: Rig) -> None:
    """One token for everyone; returns when the front end has it, or has given a call up."""
    seen = rig.engine.observations
    expected = seen.num_output_tokens + len(rig.fake.running)
    rig.fake.step()
    await rig.fake.until(
        lambda: seen.num_output_tokens >= expected or bool(rig.fake.aborted), stepping=False
    )


async def say_much(rig: Rig) -> None:
    """Tokens to everyone, not all merged into one message, until a call is given up."""
    for _ in range(30):
        await step(rig)
    await rig.fake.until(lambda: not rig.fake.running, stepping=False)
    assert rig.fake.aborted == [FinishReason.ABORT]


@pytest.mark.usefixtures("talkative")
def test_a_grpc_client_that_never_reads_loses_its_request_and_delays_nobody(start: Start):
    async def main():
        async with start() as rig:
            sampling = pb.SamplingParams(max_tokens=60, ignore_eos=True)
            stalled = rig.stub.Generate(pb.GenerateRequest(text="Hi", sampling=sampling))
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            async with AsyncClient(rig.address) as other:
                answering = asyncio.ensure_future(other.complete("Hi", max_tokens=3))
                await rig.fake.until(lambda: len(rig.fake.running) == 2, stepping=False)
                for _ in range(3):
                    await step(rig)
                await rig.fake.until(answering.done, stepping=False)
                assert answering.result()
            await say_much(rig)
            ended = rig.front_end.gate.calls.ended
            assert ended["/semipd.v1.InferenceService/Generate", "CANCELLED"] == 1
            stalled.cancel()

    asyncio.run(main())


@pytest.mark.usefixtures("talkative")
def test_a_call_that_is_given_up_makes_room_and_is_told_when_its_client_reads_on(start: Start):
    async def main():
        async with start(max_calls=1) as rig:
            sampling = pb.SamplingParams(max_tokens=60, ignore_eos=True)
            stalled = rig.stub.Generate(pb.GenerateRequest(text="Hi", sampling=sampling))
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            await say_much(rig)
            async with AsyncClient(rig.address, retries=0) as other:
                assert await while_serving(rig, other.complete("Hi", max_tokens=2))
            with pytest.raises(grpc.aio.AioRpcError, match="nothing was read for 5 s") as ended:
                await read_all(stalled)
            assert ended.value.code() is grpc.StatusCode.ABORTED

    asyncio.run(main())


def test_calls_whose_message_never_comes_take_no_room(start: Start):
    async def main():
        async with start(max_calls=2) as rig:
            generate = rig.channel.stream_stream("/semipd.v1.InferenceService/Generate")
            silent = [generate() for _ in range(3)]
            for call in silent:
                await call.wait_for_connection()
            assert (await rig.client.model_info()).name == "tiny"
            assert (await rig.stub.GetModelInfo(pb.GetModelInfoRequest())).name == "tiny"
            for call in silent:
                call.cancel()

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
            calls = rig.front_end.gate.calls
            await rig.fake.until(
                lambda: not (rig.fake.running or rig.engine._streams or calls.num_running),
                stepping=False,
            )
            assert await while_serving(rig, rig.client.complete("Hi", max_tokens=2))

    asyncio.run(main())
