import asyncio
import base64
import logging
import re
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from fake_coordinator import TIMINGS
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from server_rig import EOS, INFO, MAX_MODEL_LEN, Rig, Start, read_all

from semipd_jax.client import EngineClient
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import FinishReason
from semipd_jax.text.tokenizer import Tokenizer
from semipd_server.pb import inference_pb2 as pb
from semipd_server.server import max_message_bytes
from semipd_server.status import status_of


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


def request(**fields: Any) -> pb.GenerateRequest:
    fields = {"token_ids": ids(5, 6, 7)} | fields
    return pb.GenerateRequest(sampling=pb.SamplingParams(**fields.pop("sampling", {})), **fields)


async def responses(rig: Rig, call: Any) -> list[pb.GenerateResponse]:
    """The rest of a call's, while the coordinator steps."""
    reader = asyncio.ensure_future(read_all(call))
    await rig.fake.until(reader.done)
    return reader.result()


async def error_of(rig: Rig, call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    ending = responses(rig, call) if hasattr(call, "read") else call
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ending
    return raised.value


async def running(rig: Rig, call: Any) -> None:
    """Waits until the coordinator has the request, without a step."""
    first = asyncio.ensure_future(call.read())
    await rig.fake.until(first.done, stepping=False)
    assert first.result().WhichOneof("event") == "started"


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events)


def says(tokenizer: Tokenizer, answer: str):
    token_ids = [*tokenizer.encode(answer, add_special_tokens=False), EOS]
    return lambda _, position: token_ids[position]


# ---------------------------------------------------------------- what comes back


def test_a_stream_is_started_deltas_finished(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request(request_id="mine", sampling={"max_tokens": 3}))
            first, *deltas, last = await responses(rig, call)
            assert first.started.request_id == "mine"
            assert first.started.prompt_tokens == 3
            assert first.started.queue_ms == pytest.approx(1.0)
            tokens = [t for event in deltas for t in event.delta.token_ids]
            answer = rig.fake.answer
            assert tokens == [answer(rig.fake.submitted[0], i) for i in range(3)]
            assert last.finished.reason == pb.FINISH_REASON_LENGTH
            assert last.finished.usage == pb.Usage(prompt_tokens=3, completion_tokens=3)
            assert last.finished.timings.decode_ms == pytest.approx(1e3 * TIMINGS.decode_s)

    asyncio.run(main())


def test_text_chat_and_ids_are_prompts(start: Start, tokenizer: Tokenizer):
    chat = [{"role": "user", "content": "Grüße 😀"}]

    async def main():
        async with start() as rig:
            sampling = {"max_tokens": 1}
            message = pb.ChatMessages(messages=[pb.ChatMessage(**chat[0])])
            for prompt in ({"text": "Grüße 😀"}, {"chat": message}, {"token_ids": ids(9, 8)}):
                call = rig.stub.Generate(
                    pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **prompt)
                )
                await responses(rig, call)
            assert [list(r.prompt_token_ids) for r in rig.fake.submitted] == [
                tokenizer.encode("Grüße 😀"),
                tokenizer.encode_chat(chat),
                [9, 8],
            ]

    asyncio.run(main())


def test_unset_means_the_models_default_and_zero_means_zero(start: Start):
    async def main():
        async with start(defaults={"temperature": 0.5, "top_k": 7}) as rig:
            for sampling in ({}, {"temperature": 0.0, "top_k": 0}):
                call = rig.stub.Generate(request(sampling={"max_tokens": 1, **sampling}))
                await responses(rig, call)
            seen = [(r.sampling.temperature, r.sampling.top_k) for r in rig.fake.submitted]
            assert seen == [(0.5, 7), (0.0, 0)]

    asyncio.run(main())


@pytest.mark.parametrize(("include", "expected"), [(False, "naïve 日本"), (True, "naïve 日本語")])
def test_stop_strings_and_unicode(start: Start, tokenizer: Tokenizer, include: bool, expected: str):
    async def main():
        async with start(answer=says(tokenizer, "naïve 日本語のテキスト 😀")) as rig:
            call = rig.stub.Generate(request(sampling={"stop": ["語"], "include_stop": include}))
            events = await responses(rig, call)
            assert text_of(events) == expected
            assert events[-1].finished.reason == pb.FINISH_REASON_STOP
            assert events[-1].finished.stop_string == "語"
            assert rig.fake.aborted == [FinishReason.STOP]
            call = rig.stub.Generate(request())
            events = await responses(rig, call)
            assert text_of(events) == "naïve 日本語のテキスト 😀"
            assert events[-1].finished.stop_token_id == EOS

    asyncio.run(main())


def test_logprobs(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request(sampling={"max_tokens": 2, "logprobs": 2}))
            for event in (await responses(rig, call))[1:-1]:
                for token_id, entry in zip(
                    event.delta.token_ids, event.delta.logprobs, strict=True
                ):
                    assert entry.token_id == token_id
                    assert [(t.token_id, t.logprob) for t in entry.top] == [
                        (token_id, -0.5),
                        (token_id + 1, -1.5),
                    ]

    asyncio.run(main())


def test_many_streams_on_one_connection(start: Start):
    async def main():
        async with start() as rig:
            calls = [
                rig.stub.Generate(request(token_ids=ids(i, 3 * i), sampling={"max_tokens": 20}))
                for i in range(1, 65)
            ]
            readers = asyncio.gather(*(responses(rig, call) for call in calls))
            by_prompt: dict[tuple[int, ...], Any] = {}
            for i, events in enumerate(await readers, start=1):
                by_prompt = by_prompt or {r.prompt_token_ids: r for r in rig.fake.submitted}
                tokens = [t for event in events for t in event.delta.token_ids]
                expected = [rig.fake.answer(by_prompt[i, 3 * i], k) for k in range(20)]
                assert tokens == expected

    asyncio.run(main())


def test_tokenize_detokenize_and_model_info(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start() as rig:
            reply = await rig.stub.Tokenize(pb.TokenizeRequest(text="Grüße"))
            assert list(reply.ids) == tokenizer.encode("Grüße")
            bare = pb.TokenizeRequest(text="Grüße", add_special_tokens=False)
            assert list((await rig.stub.Tokenize(bare)).ids) == list(reply.ids)[1:]
            back = await rig.stub.Detokenize(pb.DetokenizeRequest(ids=reply.ids))
            assert back.text == "Grüße"
            full = pb.DetokenizeRequest(ids=reply.ids, skip_special_tokens=False)
            assert (await rig.stub.Detokenize(full)).text == "<|bos|>Grüße"
            assert await rig.stub.GetModelInfo(pb.GetModelInfoRequest()) == INFO

    asyncio.run(main())


def test_the_clients_request_id_header_comes_back(start: Start):
    async def main():
        async with start() as rig:
            metadata = (("x-request-id", "trace-1"),)
            call = rig.stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
            assert ("x-request-id", "trace-1") in tuple(await call.initial_metadata())
            call = rig.stub.Generate(request(sampling={"max_tokens": 0}), metadata=metadata)
            await error_of(rig, call)
            assert ("x-request-id", "trace-1") in tuple(await call.initial_metadata())

    asyncio.run(main())


# ---------------------------------------------------------------- the status table

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
            error = await error_of(rig, rig.stub.Generate(request(request_id="same")))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
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
            retry = error_details_pb2.RetryInfo()
            status = rpc_status.from_call(error)
            assert status is not None
            assert status.details[0].Unpack(retry)
            assert retry.retry_delay.seconds >= 1
            assert ("grpc-retry-pushback-ms", "1000") in tuple(error.trailing_metadata())

    asyncio.run(main())


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
            error = await error_of(rig, rig.stub.Generate(request()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            health: Any = health_pb2_grpc.HealthStub(rig.channel)
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert status == health_pb2.HealthCheckResponse.SERVING, "a busy server is well"
            ended = rig.front_end.gate.calls.ended
            refused = "/semipd.v1.InferenceService/Generate", "RESOURCE_EXHAUSTED"
            await rig.fake.until(lambda: ended[refused] == 1, stepping=False)
            for call in calls:
                call.cancel()

    asyncio.run(main())


# ---------------------------------------------------------------- ends that the client makes


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


@pytest.mark.parametrize("admitted", [True, False])
def test_a_deadline_ends_the_request_in_the_queue_and_while_running(start: Start, admitted: bool):
    async def main():
        async with start(admits=admitted) as rig:
            await rig.stub.GetModelInfo(pb.GetModelInfoRequest())  # connects
            call = rig.stub.Generate(request(), timeout=1.5)
            await rig.fake.until(lambda: len(rig.fake.running) == 1, stepping=False)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read_all(call)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await rig.fake.until(lambda: rig.fake.aborted == [FinishReason.ABORT], stepping=False)

    asyncio.run(main())


def test_abort_from_another_call_ends_the_stream_with_its_reason(start: Start):
    async def main():
        async with start() as rig:
            call = rig.stub.Generate(request(request_id="stop me"))
            await running(rig, call)
            await rig.stub.Abort(pb.AbortRequest(request_id="stop me"))
            events = await responses(rig, call)
            assert events[-1].finished.reason == pb.FINISH_REASON_ABORT
            assert await call.code() is grpc.StatusCode.OK

    asyncio.run(main())
