"""OpenAI's own client against the rig."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAI
from server_rig import EOS, Rig

from semipd_jax.text.tokenizer import Tokenizer

KEY = "a key"


def says(tokenizer: Tokenizer, answer: str):
    token_ids = [*tokenizer.encode(answer, add_special_tokens=False), EOS]
    return lambda _, position: token_ids[position]


async def while_serving[T](rig: Rig, work: Awaitable[T]) -> T:
    """The result of `work`, while the coordinator steps."""
    done = asyncio.ensure_future(work)
    await rig.fake.until(done.done)
    return done.result()


@asynccontextmanager
async def openai_client(rig: Rig, key: str = KEY) -> AsyncIterator[AsyncOpenAI]:
    client = AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=key, max_retries=0, timeout=60)
    async with client:
        yield client


async def in_thread[T](rig: Rig, work: Callable[[OpenAI], T]) -> T:
    """What `work` returns, with the blocking client in a thread."""

    def call() -> T:
        with OpenAI(base_url=f"{rig.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            return work(client)

    return await while_serving(rig, asyncio.to_thread(call))


def http_bytes(path: str, body: dict[str, Any]) -> bytes:
    """A whole request, as it is sent."""
    text = json.dumps(body)
    lines = (
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(text)}",
    )
    return ("\r\n".join((*lines, "", "")) + text).encode()


async def collect(stream: Awaitable[Any]) -> list[Any]:
    """All chunks of a stream."""
    return [chunk async for chunk in await stream]


async def request(rig: Rig, method: str, path: str, **options: Any) -> httpx2.Response:
    """A plain HTTP request, while the coordinator steps."""
    async with httpx2.AsyncClient(base_url=rig.url, timeout=60) as client:
        return await while_serving(rig, client.request(method, path, **options))
