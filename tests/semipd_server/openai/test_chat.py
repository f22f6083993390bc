import asyncio
from typing import Any

import openai
import pytest
from openai_rig import collect, in_thread, openai_client, says, while_serving
from server_rig import EOS, MAX_MODEL_LEN, Start

from semipd_jax.request import FinishReason
from semipd_jax.text.tokenizer import Tokenizer

ANSWER = "naïve 日本語 😀 fox"
CHAT: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße?"},
]


def test_whole_sync_and_async(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start(answer=says(tokenizer, ANSWER)) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "messages": CHAT}
            answers = [
                await while_serving(rig, client.chat.completions.create(**options)),
                await in_thread(rig, lambda c: c.chat.completions.create(**options)),
            ]
            for answer, request in zip(answers, rig.fake.submitted, strict=True):
                assert request.prompt_token_ids == tuple(tokenizer.encode_chat(CHAT))
                assert answer.object == "chat.completion"
                choice = answer.choices[0]
                assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
                assert choice.finish_reason == "stop"
                assert answer.usage is not None
                assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
                details = answer.usage.prompt_tokens_details
                assert details is not None
                assert details.cached_tokens == 0

    asyncio.run(main())


def test_stream(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start(answer=says(tokenizer, ANSWER)) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "messages": CHAT, "n": 2, "stream": True}
            options["stream_options"] = {"include_usage": True}
            found = [
                await while_serving(rig, collect(client.chat.completions.create(**options))),
                await in_thread(rig, lambda c: list(c.chat.completions.create(**options))),
            ]
            for *chunks, last in found:
                assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
                assert last.choices == []
                assert last.usage.prompt_tokens == len(tokenizer.encode_chat(CHAT))
                for index in (0, 1):
                    mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
                    assert mine[0].delta.role == "assistant"
                    assert "".join(c.delta.content or "" for c in mine) == ANSWER
                    assert mine[-1].finish_reason == "stop"
                    assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)

    asyncio.run(main())


def test_the_clients_own_stream_helper(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start(answer=says(tokenizer, ANSWER)) as rig, openai_client(rig) as client:

            async def read() -> Any:
                async with client.chat.completions.stream(model="tiny", messages=CHAT) as stream:
                    return await stream.get_final_completion()

            final = await while_serving(rig, read())
            assert final.choices[0].message.content == ANSWER

    asyncio.run(main())


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(start: Start, name: str):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            create = client.chat.completions.create(
                model="tiny",
                messages=CHAT,
                **{name: 3},
                temperature=0.0,
                seed=5,
                logit_bias={"9": 1},
            )
            answer = await while_serving(rig, create)
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 3
            sampling = rig.fake.submitted[0].sampling
            assert (sampling.temperature, sampling.seed) == (0.0, 5)
            assert sampling.logit_bias == ((9, 1.0),)

    asyncio.run(main())


def test_logprobs(start: Start, tokenizer: Tokenizer):
    text = "Q日é"

    async def main():
        async with start(answer=says(tokenizer, text)) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "messages": CHAT, "logprobs": True}
            create = client.chat.completions.create
            whole = await while_serving(rig, create(**options, top_logprobs=2))
            found = whole.choices[0].logprobs
            assert found is not None
            assert found.content is not None
            spelled = b"".join(bytes(entry.bytes or ()) for entry in found.content[:-1])
            assert spelled.decode() == text
            assert found.content[0].token == "Q"
            assert {entry.logprob for entry in found.content} == {-0.5}
            assert [len(entry.top_logprobs) for entry in found.content] == [2] * len(found.content)
            assert found.content[0].top_logprobs[0].token == "Q"
            chunks = await while_serving(
                rig, collect(create(**options, top_logprobs=2, stream=True))
            )
            parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
            assert [entry for part in parts for entry in part] == found.content
            bare = await while_serving(rig, create(**options))
            assert bare.choices[0].logprobs is not None
            assert [e.top_logprobs for e in bare.choices[0].logprobs.content or ()] == [[]] * len(
                found.content
            )
            options["logprobs"] = False
            for top in ({}, {"top_logprobs": 0}):
                none = await while_serving(rig, create(**(options | top)))
                assert none.choices[0].logprobs is None

    asyncio.run(main())


def test_content_parts_and_new_roles(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            messages: list[Any] = [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "name": "anna",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
            ]
            create = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
            await while_serving(rig, create)
            same = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a\nb", "name": "anna"},
            ]
            assert rig.fake.submitted[0].prompt_token_ids == tuple(tokenizer.encode_chat(same))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("messages", "param", "text"),
    [
        ([], "messages", "at least one"),
        ([{"role": "user"}], "messages[0].content", "null"),
        ([{"content": "x"}], "messages[0]", "role"),
        ([{"role": "robot", "content": "x"}], "messages", "unknown role robot"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
            "image_url",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls",
            "not supported",
        ),
        (
            [{"role": "user", "content": "x", "tool_call_id": "1"}],
            "messages[0].tool_call_id",
            "not",
        ),
        ([{"role": "assistant", "content": "x", "refusal": "No"}], "messages[0].refusal", "not"),
        ([{"role": "user", "content": "x", "nmae": "y"}], "messages[0].nmae", "unrecognized"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "null"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x", "cached": True}]}],
            "messages[0].content[0].cached",
            "unrecognized",
        ),
    ],
)
def test_bad_messages_are_named(start: Start, messages: list[Any], param: str, text: str):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            with pytest.raises(openai.BadRequestError, match=text) as refused:
                await client.chat.completions.create(model="tiny", messages=messages)
            assert refused.value.param == param
            assert refused.value.type == "invalid_request_error"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"extra_body": {"guided_regex": "a" * 5000}}, "guided_regex"),
    ],
)
def test_errors_name_the_field_that_was_sent(start: Start, fields: dict[str, Any], param: str):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, **fields}
            with pytest.raises(openai.BadRequestError, match=f"{param} is ") as refused:
                await client.chat.completions.create(**asked)
            assert refused.value.param == param

    asyncio.run(main())


@pytest.mark.parametrize("size", [MAX_MODEL_LEN, 4000])
def test_a_chat_that_is_too_long_has_openais_code(start: Start, size: int):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            messages: list[Any] = [{"role": "user", "content": "😀" * size}]
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="tiny", messages=messages)
            assert refused.value.code == "context_length_exceeded"
            assert refused.value.param == "messages"

    asyncio.run(main())


def test_an_answer_may_come_back_as_a_message(start: Start, tokenizer: Tokenizer):
    """With all the fields that the client knows, most of them null."""

    async def main():
        async with start(answer=says(tokenizer, "ab")) as rig, openai_client(rig) as client:
            create = client.chat.completions.create
            first = await while_serving(rig, create(model="tiny", messages=CHAT))
            answer = first.choices[0].message
            for message in (answer, answer.model_dump(exclude_unset=False)):
                messages: list[Any] = [*CHAT, message]
                assert await while_serving(rig, create(model="tiny", messages=messages))
            same = [*CHAT, {"role": "assistant", "content": "ab"}]
            expected = tuple(tokenizer.encode_chat(same))
            assert [r.prompt_token_ids for r in rig.fake.submitted[1:]] == [expected] * 2

    asyncio.run(main())


def test_leaving_aborts(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            stream = await while_serving(
                rig,
                client.chat.completions.create(
                    model="tiny",
                    messages=CHAT,
                    stream=True,
                    max_tokens=20,
                    extra_body={"ignore_eos": True},
                ),
            )
            assert await while_serving(rig, anext(aiter(stream)))
            if rig.fake.running:
                await stream.close()
                await rig.fake.until(lambda: bool(rig.fake.aborted), stepping=False)
                assert rig.fake.aborted == [FinishReason.ABORT]

    asyncio.run(main())


def test_the_end_token_is_no_stop_reason_but_a_requested_token_is(
    start: Start, tokenizer: Tokenizer
):
    async def main():
        async with start(answer=says(tokenizer, "ab")) as rig, openai_client(rig) as client:
            create = client.chat.completions.create
            end = await while_serving(rig, create(model="tiny", messages=CHAT))
            assert end.choices[0].stop_reason is None
            extra = {"stop_token_ids": [EOS]}
            asked = await while_serving(rig, create(model="tiny", messages=CHAT, extra_body=extra))
            assert asked.choices[0].stop_reason == EOS

    asyncio.run(main())
