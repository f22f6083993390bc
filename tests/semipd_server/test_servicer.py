"""What comes back from the gRPC service."""

import asyncio
from typing import Any

import pytest
from fake_coordinator import TIMINGS
from openai_rig import says
from server_rig import EOS, INFO, Start
from servicer_rig import error_of, ids, request, responses

from semipd_jax.request import FinishReason
from semipd_jax.text.tokenizer import Tokenizer
from semipd_server.pb import inference_pb2 as pb


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events)


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
            await rig.fake.until(lambda: rig.fake.aborted == [FinishReason.STOP], stepping=False)
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
