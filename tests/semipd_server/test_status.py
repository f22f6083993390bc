"""The table of statuses, and who is refused."""

import asyncio
import base64
import logging
import re
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from server_rig import MAX_MODEL_LEN, Start
from servicer_rig import error_of, ids, request, running

from semipd_jax.client import EngineClient
from semipd_jax.errors import InvalidRequestError
from semipd_server.pb import inference_pb2 as pb
from semipd_server.server import max_message_bytes
from semipd_server.status import status_of

INVALID = [
    ({"token_ids": ids()}, "prompt"),
    ({"token_ids": ids(10**6)}, "prompt"),
    ({"token_ids": ids(*[5] * MAX_MODEL_LEN)}, "prompt"),
    ({"token_ids": None}, "prompt"),
    ({"token_ids": None, "text": "x" * (16 * MAX_MODEL_LEN + 1)}, "prompt"),
    ({"token_ids": None, "chat": pb.ChatMessages(messages=[pb.ChatMessage(role="?")])}, "chat"),
    ({"request_id": "x" * 129}, "request_id"),
    *(
        ({"sampling": sampling}, f"sampling.{next(iter(sampling))}")
        for sampling in (
            {"max_tokens": 0},
            {"max_tokens": MAX_MODEL_LEN - 2},
            {"max_tokens": 2**32 - 1},
            {"min_tokens": MAX_MODEL_LEN},
            {"temperature": -0.5},
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"top_k": 2**31},
            {"min_p": 2.0},
            {"presence_penalty": 2.5},
            {"frequency_penalty": float("-inf")},
            {"repetition_penalty": 0.0},
            {"stop": ["x"] * 17},
            {"stop": [""]},
            {"stop": ["x" * 257]},
            {"stop_token_ids": [10**6]},
            {"stop_token_ids": [5] * 65},
            {"logit_bias": {10**6: 1.0}},
            {"logit_bias": {5: 101.0}},
            {"logit_bias": dict.fromkeys(range(301), 1.0)},
            {"logprobs": 21},
        )
    ),
]


@pytest.mark.parametrize(("fields", "name"), INVALID)
def test_a_bad_field_is_invalid_argument_and_named(start: Start, fields: dict, name: str):
    async def main():
        async with start() as rig:
            error = await error_of(rig, rig.stub.Generate(request(**fields)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            bad = error_details_pb2.BadRequest()
            status = rpc_status.from_call(error)
            assert status is not None
            assert status.details[0].Unpack(bad)
            assert bad.field_violations[0].field == name
            assert bad.field_violations[0].description == error.details()
            assert rig.fake.submitted == []

    asyncio.run(main())


def test_bad_unary_requests_are_invalid_arguments(start: Start):
    async def main():
        async with start() as rig:
            for call in (
                rig.stub.Tokenize(pb.TokenizeRequest()),
                rig.stub.Tokenize(pb.TokenizeRequest(text="x" * 10_000)),
                rig.stub.Detokenize(pb.DetokenizeRequest(ids=[5] * (MAX_MODEL_LEN + 1))),
            ):
                assert (await error_of(rig, call)).code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


@pytest.mark.parametrize("text", ["x", "é", "日", "😀", "\ud800"])
def test_messages_of_all_languages_fit_into_headers(text: str):
    status = status_of(InvalidRequestError(text * 10_000, field="prompt"))
    details = base64.b64encode(status.SerializeToString())
    assert len(quote(status.message)) + len(details) < 7 * 1024  # of 8 KiB
    assert len(status.message) > 200


def test_a_long_message_is_cut_to_fit_into_headers(start: Start):
    async def main():
        async with start() as rig:
            chat = pb.ChatMessages(messages=[pb.ChatMessage(role="日" * 300, content="x")])
            error = await error_of(rig, rig.stub.Generate(request(token_ids=None, chat=chat)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "unknown role" in error.details()

    asyncio.run(main())


def test_a_running_id_is_already_exists(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request(request_id="same"))
            await running(rig, call)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await rig.stub.Generate(request(request_id="same")).read()
            assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
            call.cancel()

    asyncio.run(main())


def test_aborting_what_does_not_run_is_not_found(start: Start):
    async def main():
        async with start() as rig:
            error = await error_of(rig, rig.stub.Abort(pb.AbortRequest(request_id="nobody")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert "nobody" in error.details()

    asyncio.run(main())


def test_a_full_queue_is_resource_exhausted_with_a_delay(start: Start):
    async def main():
        async with start(refuse="8 requests are waiting") as rig:
            error = await error_of(rig, rig.stub.Generate(request()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "8 requests are waiting"
            assert_has_delay(error)

    asyncio.run(main())


def assert_has_delay(error: grpc.aio.AioRpcError) -> None:
    retry = error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.seconds >= 1
    assert ("grpc-retry-pushback-ms", "1000") in tuple(error.trailing_metadata())


@pytest.mark.parametrize(
    ("fail_after", "code"),
    [(0, grpc.StatusCode.UNAVAILABLE), (2, grpc.StatusCode.ABORTED)],
)
def test_a_crash_is_unavailable_before_a_token_and_aborted_after(start: Start, fail_after, code):
    async def main():
        async with start(fail_after=fail_after) as rig:
            error = await error_of(rig, rig.stub.Generate(request()))
            assert error.code() is code
            assert error.details() == "the worker crashed"

    asyncio.run(main())


def test_anything_else_is_internal_and_opaque(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: object, **__: object):
        raise RuntimeError("secret at 0x7f00 in /dev/shm/semipd")

    monkeypatch.setattr(EngineClient, "generate", broken)
    caplog.set_level(logging.ERROR)

    async def main():
        async with start() as rig:
            error = await error_of(rig, rig.stub.Generate(request()))
            assert error.code() is grpc.StatusCode.INTERNAL
            match = re.fullmatch(r"internal error ([0-9a-f]{12}); .*", error.details())
            assert match is not None
            assert not re.search("secret|0x|/dev|Runtime", error.details())
            assert match[1] in caplog.text
            assert "secret" in caplog.text

    asyncio.run(main())


def test_a_message_beyond_the_bound_is_refused_unread(start: Start):
    async def main():
        async with start() as rig:
            text = "x" * (max_message_bytes(MAX_MODEL_LEN) + 1)
            error = await error_of(rig, rig.stub.Generate(request(token_ids=None, text=text)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(main())


def test_calls_beyond_the_limit_are_refused(start: Start):
    async def main():
        async with start(max_calls=2) as rig:
            calls = [rig.stub.Generate(request(request_id=str(i))) for i in range(2)]
            for call in calls:
                await running(rig, call)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await rig.stub.Generate(request()).read()
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert_has_delay(raised.value)
            health: Any = health_pb2_grpc.HealthStub(rig.channel)
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert status == health_pb2.HealthCheckResponse.SERVING, "a busy server is well"
            ended = rig.front_end.gate.calls.ended
            refused = "/semipd.v1.InferenceService/Generate", "RESOURCE_EXHAUSTED"
            await rig.fake.until(lambda: ended[refused] == 1, stepping=False)
            for call in calls:
                call.cancel()

    asyncio.run(main())


def test_calls_that_began_while_there_was_room_are_refused_when_there_is_none(start: Start):
    async def main():
        async with start(max_calls=2) as rig:
            generate = rig.channel.stream_stream("/semipd.v1.InferenceService/Generate")
            calls = [generate() for _ in range(3)]
            for call in calls:
                await call.wait_for_connection()
            assert await rig.stub.GetModelInfo(pb.GetModelInfoRequest())  # by now they have begun
            message = request(sampling={"max_tokens": 60, "ignore_eos": True}).SerializeToString()
            for call in calls:
                await call.write(message)
                await call.done_writing()
            endings = [asyncio.ensure_future(call.code()) for call in calls]
            await rig.fake.until(
                lambda: len(rig.fake.submitted) + sum(e.done() for e in endings) == len(calls),
                stepping=False,
            )
            assert len(rig.fake.submitted) == 2
            for call, ending in zip(calls, endings, strict=True):
                if ending.done():
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await call.read()
                    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert_has_delay(raised.value)
                call.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("method", ["Generate", "GetModelInfo"])
def test_a_call_without_a_message_is_its_clients_fault(start: Start, method: str):
    async def main():
        async with start() as rig:
            call = rig.channel.stream_stream(f"/semipd.v1.InferenceService/{method}")()
            await call.done_writing()
            assert await asyncio.wait_for(call.code(), 60) is grpc.StatusCode.INVALID_ARGUMENT
            assert await call.details() == "there is no message; allowed: one"

    asyncio.run(main())
