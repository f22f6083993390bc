"""Several generations for one request, at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from semipd_jax.client import EngineClient
from semipd_jax.request import Event, Finished


@dataclass(frozen=True, slots=True)
class Choice:
    """One generation. `sampling` has the fields of `request.SamplingParams` that are set."""

    prompt_index: int
    token_ids: tuple[int, ...]
    sampling: dict[str, Any]
    priority: int = 0
    cache_salt: str = ""


async def events(
    client: EngineClient, answer_id: str, wanted: Sequence[Choice]
) -> AsyncGenerator[tuple[int, Event]]:
    """(index of the choice, event) as they happen. The first error ends all."""

    def generate(index: int) -> AsyncGenerator[Event]:
        choice = wanted[index]
        return client.generate(
            choice.token_ids,
            choice.sampling,
            request_id=f"{answer_id}-{index}",
            priority=choice.priority,
            cache_salt=choice.cache_salt,
        )

    if len(wanted) == 1:
        async with aclosing(generate(0)) as single:
            async for event in single:
                yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(len(wanted))

    async def pass_on(index: int) -> None:
        try:
            async with aclosing(generate(index)) as stream:
                async for event in stream:
                    await arrived.put((index, event))
        except Exception as error:
            await arrived.put((index, error))

    tasks = [asyncio.create_task(pass_on(index)) for index in range(len(wanted))]
    try:
        num_running = len(wanted)
        while num_running:
            index, event = await arrived.get()
            if isinstance(event, Exception):
                raise event
            yield index, event
            num_running -= isinstance(event, Finished)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
