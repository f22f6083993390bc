"""Several generations for one request, at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from semipd_jax.config import SchedulerConfig
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import Event, Finished
from semipd_server.gate import Engine


@dataclass(frozen=True, slots=True)
class Choice:
    """One generation. `sampling` has the fields of `request.SamplingParams` that are set."""

    prompt_index: int
    token_ids: tuple[int, ...]
    sampling: dict[str, Any]
    priority: int = 0
    cache_salt: str = ""


async def events(
    engine: Engine, answer_id: str, wanted: Sequence[Choice]
) -> AsyncGenerator[tuple[int, Event]]:
    """(index of the choice, event) as they happen. The first error ends all.

    Raises:
      InvalidRequestError: even an empty queue does not take them all.
      EngineError: what `EngineClient.generate` raises.
    """
    _check_room(wanted, engine.limits)

    def generate(index: int) -> AsyncGenerator[Event]:
        choice = wanted[index]
        return engine.client.generate(
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


def _check_room(wanted: Sequence[Choice], limits: SchedulerConfig) -> None:
    """Choices come to the queue together, before the first of them has a row: what does not fit
    into it at once would be refused for ever, and must not look as if it might fit later."""
    num_prompts = len({choice.prompt_index for choice in wanted})
    n = len(wanted) // num_prompts
    field, value = ("n", n) if n > 1 else ("prompt", f"a list of {num_prompts}")
    if len(wanted) > limits.max_num_queued_reqs:
        raise InvalidRequestError(
            f"{field} is {value}, which makes {len(wanted)} choices of {num_prompts} prompts; "
            f"allowed: at most {limits.max_num_queued_reqs} choices in one request",
            field=field,
        )
    num_tokens = sum(len(choice.token_ids) for choice in wanted)
    most = limits.max_num_queued_tokens
    if most is not None and len(wanted) > 1 and num_tokens > most:
        raise InvalidRequestError(
            f"{field} is {value}, which makes {num_tokens} prompt tokens in {len(wanted)} choices; "
            f"allowed: at most {most} in one request of several choices",
            field=field,
        )
