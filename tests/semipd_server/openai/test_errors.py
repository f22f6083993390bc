"""Everything but success: statuses, OpenAI's shape, and what must not be told."""

import asyncio
import json
import logging
import re
from typing import Any

import openai
import pytest
from openai_rig import openai_client, request, while_serving
from server_rig import MAX_MODEL_LEN, Start

from semipd_jax.client import EngineClient
from semipd_jax.config import SchedulerConfig
from semipd_server.limits import MAX_CHOICES, MAX_PROMPTS
from semipd_server.openai import schema

PLAIN = {"model": "tiny", "prompt": "Hi"}

INVALID = [
    ({"prompt": []}, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
    ({"prompt": "x" * 2000}, "prompt"),
    ({"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt"),
    ({"prompt": [[5]] * (MAX_PROMPTS + 1)}, "prompt"),
    ({"prompt": [[5], [5] * (MAX_MODEL_LEN + 1)]}, "prompt[1]"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": MAX_CHOICES + 1}, "n"),
    ({"n": 2**31 - 1}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
    ({"max_tokens": "3"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x", 5]}, "stop[1]"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"stop_token_ids": [5] * 65}, "stop_token_ids"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice"),
    ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": "json"}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"guided_json": []}, "guided_json"),
    ({"guided_regex": "a" * 4097}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "start: /a/"}, "guided_grammar"),
    ({"structured_outputs": {"grammar": "start: /a/"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_json"),
    ({"max_token": 3}, "max_token"),
]


@pytest.mark.parametrize(("fields", "param"), INVALID)
def test_a_bad_field_is_named_with_its_value(start: Start, fields: dict[str, Any], param: str):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            body = PLAIN | fields
            with pytest.raises(openai.BadRequestError) as refused:
                await client.post("/completions", cast_to=object, body=body)
            assert refused.value.param == param
            assert refused.value.type == "invalid_request_error"
            assert rig.fake.submitted == []
            good = await while_serving(
                rig, client.completions.create(model="tiny", prompt="Hi", max_tokens=1)
            )
            assert good.choices

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        ({"prompt": [5] * (MAX_MODEL_LEN + 1)}, "prompt"),
        ({"prompt": "x" * 2000}, "prompt"),
        ({"prompt": [5] * 9, "max_tokens": MAX_MODEL_LEN - 8}, "max_tokens"),
    ],
)
def test_what_is_too_long_for_the_model_has_openais_code(
    start: Start, fields: dict[str, Any], param: str
):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.completions.create(model="tiny", **fields)
            assert refused.value.code == "context_length_exceeded"
            assert refused.value.param == param

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x", "stop": ["x"] * 17}),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [5] * 65}),
        ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}),
        ("/v1/completions", {"prompt": "x", "guided_choice": ["a"] * 1025}),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"choice": ["a"] * 1025}}),
        ("/v1/completions", {"prompt": [5] * (MAX_MODEL_LEN + 1)}),
        ("/v1/completions", {"prompt": ["x"] * (MAX_PROMPTS + 1)}),
        ("/v1/completions", {"prompt": [[5] * (MAX_MODEL_LEN + 1)]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 4097}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}] * 4097}),
        ("/detokenize", {"tokens": [5] * (MAX_MODEL_LEN + 1)}),
    ],
)
def test_entries_are_counted_before_any_work(
    start: Start, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
):
    async def main():
        async with start() as rig:
            for method in ("encode", "decode", "prepare", "run"):
                monkeypatch.setattr(EngineClient, method, None)
            monkeypatch.setattr("semipd_server.openai.app.conversation", None)
            reply = await request(rig, "POST", path, json=fields)
            assert reply.status_code == 400
            assert " entries; allowed: at most " in reply.json()["error"]["message"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": NaN}',
        b'{"\xff": 1}',
    ],
)
def test_what_is_no_json_object_is_a_bad_request(start: Start, body: bytes):
    async def main():
        async with start() as rig:
            headers = {"content-type": "application/json"}
            reply = await request(rig, "POST", "/v1/completions", content=body, headers=headers)
            assert reply.status_code == 400
            assert "body" in reply.json()["error"]["message"]

    asyncio.run(main())


def test_other_content_types_are_refused(start: Start):
    async def main():
        async with start() as rig:
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                headers = {"content-type": kind}
                body = json.dumps(PLAIN)
                reply = await request(rig, "POST", "/v1/completions", content=body, headers=headers)
                assert reply.status_code == 415
            headers = {"content-type": "Application/JSON; charset=utf-8"}
            reply = await request(rig, "POST", "/v1/completions", content=body, headers=headers)
            assert reply.status_code == 200

    asyncio.run(main())


def test_a_body_beyond_the_bound_is_refused(start: Start):
    async def main():
        async with start() as rig:
            body = json.dumps(PLAIN | {"prompt": "x" * (8 << 20)})
            headers = {"content-type": "application/json"}
            reply = await request(rig, "POST", "/v1/completions", content=body, headers=headers)
            assert reply.status_code == 413
            assert reply.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(main())


@pytest.mark.parametrize("opening", ["[", "{"])
def test_a_body_of_millions_of_arrays_or_objects_is_refused_before_they_are_made(
    start: Start, monkeypatch: pytest.MonkeyPatch, opening: str
):
    def decode(body: bytes) -> Any:
        raise AssertionError("it was decoded")

    async def main():
        async with start() as rig:
            body = f'{{"metadata": [{opening * 1_000_000}'.encode()
            headers = {"content-type": "application/json"}
            with monkeypatch.context() as patch:
                patch.setattr(schema.msgspec.json, "decode", decode)
                reply = await request(rig, "POST", "/v1/completions", content=body, headers=headers)
            assert reply.status_code == 400
            assert "opening brackets; allowed" in reply.json()["error"]["message"]

    asyncio.run(main())


def test_unknown_models_and_routes(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            with pytest.raises(openai.NotFoundError, match="no-such") as missing:
                await client.completions.create(model="no-such", prompt="Hi")
            assert missing.value.code == "model_not_found"
            assert missing.value.param == "model"
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="tiny", input="x")
            reply = await request(rig, "GET", "/v1/completions")
            assert reply.status_code == 405
            assert reply.headers["allow"] == "POST"
            assert "error" in reply.json()
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("no-such")

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_a_delay(start: Start, stream: bool):
    async def main():
        async with start(refuse="8 requests are waiting") as rig, openai_client(rig) as client:
            with pytest.raises(openai.RateLimitError, match="8 requests are waiting") as refused:
                await while_serving(
                    rig, client.completions.create(model="tiny", prompt="Hi", stream=stream)
                )
            assert refused.value.response.headers["retry-after"] == "1"
            assert refused.value.code == "queue_full"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"prompt": ["Hi"] * 3, "n": 2}, "n", "6 choices of 3 prompts; allowed: at most 5"),
        ({"prompt": ["Hi"] * 6}, "prompt", "6 choices of 6 prompts; allowed: at most 5"),
        ({"prompt": [5] * 21, "n": 2}, "n", "42 prompt tokens in 2 choices; allowed: at most 40"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_more_choices_than_the_queue_ever_takes_are_no_reason_to_try_again(
    start: Start, fields: dict[str, Any], param: str, told: str, stream: bool
):
    limits = SchedulerConfig(max_num_queued_reqs=5, max_num_queued_tokens=40)
    asked = {"model": "tiny", "prompt": "Hi", "max_tokens": 1, "stream": stream}

    async def main():
        async with start(limits=limits) as rig, openai_client(rig) as client:
            with pytest.raises(openai.BadRequestError, match=told) as refused:
                await client.post("/completions", cast_to=object, body=asked | fields)
            assert refused.value.param == param
            assert "retry-after" not in refused.value.response.headers
            assert rig.fake.submitted == []
            for fits in ({"prompt": ["Hi"] * 5}, {"n": 5}, {"prompt": [5] * 20, "n": 2}):
                body = asked | fits | {"stream": False}
                answer = client.post("/completions", cast_to=object, body=body)
                assert await while_serving(rig, answer)

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_a_crash_before_the_first_token_is_503(start: Start, n: int):
    async def main():
        async with start(fail_after=0) as rig, openai_client(rig) as client:
            with pytest.raises(openai.InternalServerError, match="crashed") as refused:
                await while_serving(rig, client.completions.create(model="tiny", prompt="x", n=n))
            assert refused.value.status_code == 503

    asyncio.run(main())


def test_a_crash_in_a_stream_is_its_last_event(start: Start):
    async def main():
        async with start(fail_after=3) as rig, openai_client(rig) as client:

            async def read() -> None:
                create = client.completions.create(model="tiny", prompt="x", stream=True)
                async for chunk in await create:
                    seen.append(chunk)

            seen: list[Any] = []
            with pytest.raises(openai.APIError, match="crashed"):
                await while_serving(rig, read())
            assert seen
            assert rig.fake.running == {}

    asyncio.run(main())


def test_anything_else_is_opaque(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: object, **__: object):
        raise RuntimeError("secret at 0x7f00 in /dev/shm/semipd")

    monkeypatch.setattr(EngineClient, "encode", broken)
    caplog.set_level(logging.ERROR)

    async def main():
        async with start() as rig:
            for path, body in (
                ("/v1/completions", PLAIN),
                ("/v1/completions", PLAIN | {"stream": True}),
                ("/tokenize", {"prompt": "x"}),
            ):
                reply = await request(rig, "POST", path, json=body)
                assert reply.status_code == 500
                error = reply.json()["error"]
                match = re.fullmatch(r"internal error ([0-9a-f]{12}); .*", error["message"])
                assert match is not None
                assert not re.search("secret|0x|/dev|Runtime", reply.text)
                assert match[1] in caplog.text

    asyncio.run(main())


def test_before_and_after_serving_requests_are_503(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            await rig.front_end.drain(1.0)
            with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
                await client.completions.create(model="tiny", prompt="Hi")
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
            listed = [model async for model in client.models.list()]
            assert await client.models.retrieve("tiny") == listed[0]

    asyncio.run(main())


def test_the_request_id_header_comes_back(start: Start):
    async def main():
        async with start() as rig:
            for path, status in (("/health", 200), ("/nowhere", 404), ("/v1/models", 200)):
                reply = await request(rig, "GET", path, headers={"x-request-id": "trace-1"})
                assert reply.status_code == status
                assert reply.headers["x-request-id"] == "trace-1"

    asyncio.run(main())
