import asyncio
from typing import Any
from unittest.mock import Mock

import pytest
from openai_rig import collect, in_thread, openai_client, request, says, while_serving
from server_rig import EOS, Start

from semipd_jax.client import EngineClient, sampling
from semipd_jax.errors import OverloadedError
from semipd_jax.request import FinishReason, Request
from semipd_jax.text.tokenizer import Tokenizer
from semipd_server.settings import Settings

ANSWER = "naïve 日本語 😀 fox"
CHECKS = ("parse_sampling", "validate_sampling", "validate_prompt")


def test_whole_sync_and_async(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start(answer=says(tokenizer, ANSWER)) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "prompt": "Grüße", "max_tokens": 40}
            answers = [
                await while_serving(rig, client.completions.create(**options)),
                await in_thread(rig, lambda c: c.completions.create(**options)),
            ]
            prompt = tokenizer.encode("Grüße")
            for answer, request in zip(answers, rig.fake.submitted, strict=True):
                assert request.prompt_token_ids == tuple(prompt)
                assert request.sampling.max_tokens == 40
                assert answer.object == "text_completion"
                assert answer.model == "tiny"
                assert [c.text for c in answer.choices] == [ANSWER]
                assert answer.choices[0].finish_reason == "stop"
                tokens = len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
                usage = answer.usage
                assert usage is not None
                assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), tokens)
                assert usage.total_tokens == len(prompt) + tokens
            assert answers[0].id != answers[1].id
            assert answers[0].id in rig.fake.submitted[0].request_id

    asyncio.run(main())


@pytest.mark.parametrize("usage", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_stream(start: Start, tokenizer: Tokenizer, usage: dict | None):
    async def main():
        async with start(answer=says(tokenizer, ANSWER)) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "prompt": [5, 6], "max_tokens": 40}
            options |= {"stream": True, **({"stream_options": usage} if usage else {})}
            asynchronous = await while_serving(rig, collect(client.completions.create(**options)))
            blocking = await in_thread(rig, lambda c: list(c.completions.create(**options)))
            for chunks in (asynchronous, blocking):
                assert len({chunk.id for chunk in chunks}) == 1
                *rest, last = chunks
                if usage == {"include_usage": True}:
                    assert last.choices == []
                    assert last.usage.prompt_tokens == 2
                    assert all(chunk.usage is None for chunk in rest)
                    *rest, last = rest
                elif usage:
                    counts = [chunk.usage.completion_tokens for chunk in chunks]
                    assert counts == sorted(counts)
                    assert counts[-1] == len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
                else:
                    assert not any(chunk.usage for chunk in chunks)
                assert rest
                assert "".join(chunk.choices[0].text for chunk in [*rest, last]) == ANSWER
                assert last.choices[0].finish_reason == "stop"
                assert all(chunk.choices[0].finish_reason is None for chunk in rest)

    asyncio.run(main())


def test_every_sampling_option_reaches_the_engine(start: Start):
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.75,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "seed": 7,
        "stop": ["xx", "yy"],
        "logit_bias": {"5": -3},
        "logprobs": 2,
        "max_tokens": 3,
    }
    extra = {
        "top_k": 9,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": [40],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
    }

    async def main():
        async with start() as rig, openai_client(rig) as client:
            create = client.completions.create
            await while_serving(rig, create(model="tiny", prompt=[5], **given, extra_body=extra))
            sampling = rig.fake.submitted[-1].sampling
            named = {"include_stop_str_in_output": "include_stop"}
            for name, value in (given | extra).items():
                found = getattr(sampling, named.get(name, name))
                expected = {"stop": ("xx", "yy"), "logit_bias": ((5, -3.0),)}.get(name, value)
                assert found == (tuple(expected) if isinstance(expected, list) else expected), name
            await while_serving(rig, create(model="tiny", prompt=[5], extra_body={"top_k": -1}))
            assert rig.fake.submitted[-1].sampling.top_k == 0
            await while_serving(rig, create(model="tiny", prompt=[5], seed=-1))
            assert rig.fake.submitted[-1].sampling.max_tokens == 16  # OpenAI's default

    asyncio.run(main())


def test_unset_and_null_options_are_the_models_defaults(start: Start):
    async def main():
        async with start(defaults={"temperature": 0.5}) as rig, openai_client(rig) as client:
            for extra in ({}, {"temperature": None, "n": None, "stop": None, "tools": None}):
                create = client.completions.create(model="tiny", prompt=[5], extra_body=extra)
                await while_serving(rig, create)
                assert rig.fake.submitted[-1].sampling.temperature == 0.5

    asyncio.run(main())


def test_stop_strings(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start(answer=says(tokenizer, ANSWER)) as rig, openai_client(rig) as client:
            create = client.completions.create
            answer = await while_serving(rig, create(model="tiny", prompt="x", stop="語"))
            assert answer.choices[0].text == "naïve 日本"
            assert answer.choices[0].finish_reason == "stop"
            assert answer.choices[0].stop_reason == "語"
            await rig.fake.until(lambda: rig.fake.aborted == [FinishReason.STOP], stepping=False)

    asyncio.run(main())


def test_many_prompts_and_choices(start: Start, tokenizer: Tokenizer):
    prompts = ["one", "two", "three"]

    async def main():
        async with start() as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "n": 2, "max_tokens": 4, "seed": -1}
            whole = await while_serving(rig, client.completions.create(prompt=prompts, **options))
            assert [c.index for c in whole.choices] == list(range(6))
            ids = [tuple(tokenizer.encode(p)) for p in prompts]
            texts = []
            for prompt in ids:
                request = next(r for r in rig.fake.submitted if r.prompt_token_ids == prompt)
                tokens = [rig.fake.answer(request, k) for k in range(4)]
                texts += 2 * [tokenizer.decode(tokens)]
            assert [c.text for c in whole.choices] == texts
            assert whole.usage is not None
            assert whole.usage.prompt_tokens == sum(map(len, ids))
            assert whole.usage.completion_tokens == 24
            seeds = [r.sampling.seed for r in rig.fake.submitted]
            assert len(set(seeds)) == 2  # another for each choice, the same for each prompt
            stream = client.completions.create(prompt=ids, stream=True, **options)
            joined = dict.fromkeys(range(6), "")
            for chunk in await while_serving(rig, collect(stream)):
                joined[chunk.choices[0].index] += chunk.choices[0].text
            assert list(joined.values()) == texts

    asyncio.run(main())


def test_what_choices_share_is_checked_once(
    start: Start, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    asked = {"temperature": 0.5, "max_tokens": 1, "guided_json": {"type": "object"}}
    checks = {name: Mock(wraps=getattr(sampling, name)) for name in CHECKS}
    for name, check in checks.items():
        monkeypatch.setattr(sampling, name, check)

    async def main():
        async with start() as rig:
            body = {"prompt": [[5, 6], [7], [8]], "n": 5, "seed": 3, **asked}
            reply = await request(rig, "POST", "/v1/completions", json=body)
            assert len(reply.json()["choices"]) == 15
            seeds = [submitted.sampling.seed for submitted in rig.fake.submitted]
            assert seeds == [3, 4, 5, 6, 7] * 3

    asyncio.run(main())
    counts = {name: check.call_count for name, check in checks.items()}
    assert counts == {"parse_sampling": 1, "validate_sampling": 1, "validate_prompt": 3}


@pytest.mark.parametrize("stream", [False, True])
def test_no_choice_is_begun_after_one_that_failed(
    start: Start, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    begun: list[str] = []

    async def fail(self: EngineClient, request_: Request, request_id: str, seed: int | None):
        begun.append(request_id)
        raise OverloadedError("the link is full")
        yield

    async def main():
        async with start() as rig:
            monkeypatch.setattr(EngineClient, "run", fail)
            body = {"prompt": [[5]] * 9, "n": 9, "stream": stream}
            reply = await request(rig, "POST", "/v1/completions", json=body)
            assert reply.status_code == 429
            assert len(begun) == 1

    asyncio.run(main())


def test_logprobs(start: Start, tokenizer: Tokenizer):
    text = "Q日é"

    async def main():
        async with start(answer=says(tokenizer, text)) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 40}
            whole = await while_serving(rig, client.completions.create(**options, logprobs=2))
            chunks = await while_serving(
                rig, collect(client.completions.create(**options, logprobs=2, stream=True))
            )
            found = whole.choices[0].logprobs
            assert found is not None
            tokens = [*tokenizer.encode(text, add_special_tokens=False), EOS]
            assert found.token_logprobs == [-0.5] * len(tokens)
            assert [len(top) for top in found.top_logprobs] == [2] * len(tokens)
            assert found.tokens[0] == "Q"
            assert found.tokens[-1] == "<|eos|>"
            assert found.text_offset[0] == 0
            assert found.text_offset[-1] == len(text)
            assert found.text_offset == sorted(found.text_offset)
            streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [entry for part in streamed for entry in getattr(part, name)]
                assert joined == getattr(found, name)
            none = await while_serving(rig, client.completions.create(**options))
            assert none.choices[0].logprobs is None
            bare = await while_serving(rig, client.completions.create(**options, logprobs=0))
            assert bare.choices[0].logprobs is not None
            assert [list(top) for top in bare.choices[0].logprobs.top_logprobs] == [
                [token] for token in found.tokens
            ]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_echo(start: Start, tokenizer: Tokenizer, stream: bool):
    async def main():
        async with start(answer=says(tokenizer, "fox")) as rig, openai_client(rig) as client:
            for prompt in ("Grüße ", tokenizer.encode("Grüße ", add_special_tokens=False)):
                options: dict[str, Any] = {"model": "tiny", "prompt": prompt, "echo": True}
                create = client.completions.create(**options, stream=stream)
                if stream:
                    chunks = await while_serving(rig, collect(create))
                    text = "".join(chunk.choices[0].text for chunk in chunks)
                else:
                    text = (await while_serving(rig, create)).choices[0].text
                assert text == "Grüße fox"

    asyncio.run(main())


def test_beginning_of_sequence_token_can_be_left_out(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            extra = {"add_special_tokens": False}
            create = client.completions.create(model="tiny", prompt="Hi", extra_body=extra)
            await while_serving(rig, create)
            bare = tuple(tokenizer.encode("Hi", add_special_tokens=False))
            assert rig.fake.submitted[0].prompt_token_ids == bare

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_aborts_every_choice(start: Start, stream: bool, n: int):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            create = client.completions.create(
                model="tiny", prompt=[5], n=n, stream=stream, max_tokens=60
            )
            task = asyncio.ensure_future(collect(create) if stream else create)
            await rig.fake.until(lambda: len(rig.fake.running) == n, stepping=False)
            rig.fake.step()
            task.cancel()
            await rig.fake.until(lambda: len(rig.fake.aborted) == n, stepping=False)
            assert rig.fake.aborted == n * [FinishReason.ABORT]

    asyncio.run(main())


def test_priority_and_salt_are_taken_as_vllm_takes_them(start: Start):
    async def main():
        settings = Settings(port=0, http_port=0, min_priority=-3)
        async with start(settings=settings) as rig, openai_client(rig) as client:
            options: dict[str, Any] = {"model": "tiny", "prompt": [5, 6], "max_tokens": 1, "n": 2}
            extra = {"priority": -3, "cache_salt": "tenant"}
            await while_serving(rig, client.completions.create(**options, extra_body=extra))
            seen = [(request.priority, request.cache_salt) for request in rig.fake.submitted]
            assert seen == [(-3, "tenant")] * 2

    asyncio.run(main())
