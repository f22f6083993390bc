import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from server_rig import EOS, INFO, Rig, Start

from semipd_jax.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    RequestNotFoundError,
)
from semipd_jax.request import Delta, Event, Finished, FinishReason, Started
from semipd_jax.text.tokenizer import Tokenizer
from semipd_server import client as client_module
from semipd_server.client import AsyncClient, Client
from semipd_server.settings import Settings


def says(tokenizer: Tokenizer, answer: str):
    token_ids = [*tokenizer.encode(answer, add_special_tokens=False), EOS]
    return lambda _, position: token_ids[position]


async def while_serving[T](rig: Rig, work: Awaitable[T], *, stepping: bool = True) -> T:
    done = asyncio.ensure_future(work)
    await rig.fake.until(done.done, stepping=stepping)
    return done.result()


def in_thread[T](rig: Rig, work: Callable[[Client], T], *, stepping: bool = True) -> Awaitable[T]:
    def call() -> T:
        with Client(rig.address) as client:
            return work(client)

    return while_serving(rig, asyncio.to_thread(call), stepping=stepping)


def test_events_and_text_are_the_same_blocking_and_not(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start(answer=says(tokenizer, "日本 fox")) as rig:
            options = {"max_tokens": 50, "stop": "zzz", "logprobs": 1}

            async def collect(client: AsyncClient) -> list[Event]:
                return [event async for event in client.generate("Hi", **options)]

            events = await while_serving(rig, collect(rig.client))
            blocking = await in_thread(rig, lambda client: list(client.generate("Hi", **options)))
            for found in (events, blocking):
                assert isinstance(found[0], Started)
                assert isinstance(found[-1], Finished)
                assert found[-1].reason is FinishReason.STOP
                deltas = [event for event in found if isinstance(event, Delta)]
                assert "".join(delta.text for delta in deltas) == "日本 fox"
                assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
            assert await while_serving(rig, rig.client.complete("Hi")) == "日本 fox"
            assert await in_thread(rig, lambda client: client.complete([5, 6])) == "日本 fox"
            chat = [{"role": "user", "content": "Hi"}]
            assert await in_thread(rig, lambda client: client.complete(chat)) == "日本 fox"
            assert rig.fake.submitted[-1].prompt_token_ids == tuple(tokenizer.encode_chat(chat))

    asyncio.run(main())


def test_everything_else(start: Start, tokenizer: Tokenizer):
    chat = [{"role": "user", "content": "Hi"}]

    async def main():
        async with start() as rig:
            token_ids = await rig.client.tokenize("Grüße")
            assert token_ids == tokenizer.encode("Grüße")
            assert await rig.client.tokenize(chat) == tokenizer.encode_chat(chat)
            assert await rig.client.detokenize(token_ids) == "Grüße"
            assert await rig.client.model_info() == INFO
            assert await in_thread(rig, lambda c: c.tokenize("Grüße")) == token_ids
            bare = await in_thread(rig, lambda c: c.tokenize("Grüße", add_special_tokens=False))
            assert bare == token_ids[1:]
            shown = await in_thread(
                rig, lambda c: c.detokenize(token_ids, skip_special_tokens=False)
            )
            assert shown == "<|bos|>Grüße"
            assert await in_thread(rig, lambda c: c.model_info()) == INFO

    asyncio.run(main())


def test_leaving_a_stream_aborts_it(start: Start):
    async def main():
        async with start() as rig:
            async with aclosing(rig.client.generate("Hi")) as events:
                await while_serving(rig, anext(events), stepping=False)
            await rig.fake.until(lambda: len(rig.fake.aborted) == 1, stepping=False)

            def leave(client: Client) -> None:
                events = client.generate("Hi")
                next(events)
                events.close()

            await in_thread(rig, leave, stepping=False)
            await rig.fake.until(lambda: len(rig.fake.aborted) == 2, stepping=False)

    asyncio.run(main())


def test_abort_by_id(start: Start):
    async def main():
        async with start() as rig:
            async with aclosing(rig.client.generate("Hi", request_id="stop me")) as events:
                await while_serving(rig, anext(events), stepping=False)
                await rig.client.abort("stop me")
                await rig.fake.until(lambda: bool(rig.fake.aborted), stepping=False)
                rest = await while_serving(rig, _collect(events))
            assert rest[-1].reason is FinishReason.ABORT
            with pytest.raises(RequestNotFoundError, match="stop me"):
                await in_thread(rig, lambda client: client.abort("stop me"))

    asyncio.run(main())


async def _collect(events) -> list[Event]:
    return [event async for event in events]


def test_errors_are_the_engines_own(start: Start):
    async def main():
        async with start() as rig:
            with pytest.raises(InvalidRequestError, match="top_p") as error:
                await rig.client.complete("Hi", top_p=3.0)
            assert error.value.field == "sampling.top_p"
            with pytest.raises(InvalidRequestError, match="best_of"):
                await rig.client.complete("Hi", best_of=3)
            rig.fake.refuse = "full"
            with pytest.raises(OverloadedError, match="full"):
                await while_serving(rig, rig.client.complete("Hi"))
            with pytest.raises(OverloadedError, match="full"):
                await in_thread(rig, lambda client: client.complete("Hi"))
            rig.fake.refuse, rig.fake.fail_after = None, 1
            with pytest.raises(RequestFailedError, match="crashed"):
                await while_serving(rig, rig.client.complete("Hi"))

    asyncio.run(main())


def test_a_running_id_and_a_deadline(start: Start):
    async def main():
        async with start() as rig:
            async with aclosing(rig.client.generate("Hi", request_id="same")) as events:
                await while_serving(rig, anext(events), stepping=False)
                with pytest.raises(DuplicateRequestError):
                    await rig.client.complete("Hi", request_id="same")
            with pytest.raises(TimeoutError):
                await rig.client.complete("Hi", timeout_s=0.1)

    asyncio.run(main())


def test_a_message_that_is_too_large_stays_a_grpc_error(start: Start):
    async def main():
        async with start() as rig:
            with pytest.raises(grpc.RpcError) as error:
                await rig.client.complete("x" * 2_000_000)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(main())


def test_the_command_prints_a_completion(
    start: Start, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
):
    async def main():
        async with start(answer=says(tokenizer, "日本 fox")) as rig:
            arguments = ["--target", rig.address, "--max-tokens", "9", "--temperature", "0", "Hi"]
            await while_serving(rig, asyncio.to_thread(client_module.main, arguments))
            assert rig.fake.submitted[0].sampling.temperature == 0.0

    asyncio.run(main())
    assert capsys.readouterr().out == "日本 fox\n"


def test_the_command_says_what_went_wrong():
    with pytest.raises(SystemExit, match=r"error: .*127\.0\.0\.1:1"):
        client_module.main(["--target", "127.0.0.1:1", "Hi"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"api_keys": ("k",)}, "UNAUTHENTICATED"), ({"request_timeout": 0.1}, "longer than 0.1 s")],
)
def test_the_command_says_what_the_server_refuses(start: Start, fields: dict[str, Any], said: str):
    def command(address: str) -> None:
        with pytest.raises(SystemExit, match=rf"(?s)error: .*{said}"):
            client_module.main(["--target", address, "Hi"])

    async def main():
        async with start(settings=Settings(port=0, http_port=0, **fields)) as rig:
            ended = asyncio.ensure_future(asyncio.to_thread(command, rig.address))
            await rig.fake.until(ended.done, stepping=False)
            ended.result()

    asyncio.run(main())


def test_priority_and_salt_reach_the_coordinator(start: Start):
    async def main():
        async with start(settings=Settings(port=0, http_port=0, min_priority=-3)) as rig:
            options = {"max_tokens": 1, "priority": -3, "cache_salt": "tenant"}
            await while_serving(rig, rig.client.complete([5, 6], **options))
            await in_thread(rig, lambda client: client.complete([5, 6], **options))
            await while_serving(rig, rig.client.complete([5, 6], max_tokens=1))
            seen = [(request.priority, request.cache_salt) for request in rig.fake.submitted]
            assert seen == [(-3, "tenant"), (-3, "tenant"), (0, "")]
            with pytest.raises(InvalidRequestError) as error:
                await rig.client.complete([5, 6], cache_salt="x" * 257)
            assert error.value.field == "cache_salt"

    asyncio.run(main())
