"""Several generations for one request, at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from semipd_jax.client.sampling import fold_seed
from semipd_jax.config import SchedulerConfig
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import Event, Finished, Request
from semipd_server.gate import Engine


@dataclass(frozen=True, slots=True)
class Choices:
    """As many of each prompt as there are seeds; all of the first prompt come first.

    Attributes:
      requests: one for each prompt, checked.
      seeds: None is the engine's choice.
    """

    requests: Sequence[Request]
    seeds: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.requests) * len(self.seeds)

    def prompt_of(self, index: int) -> int:
        """Index of the prompt of a choice."""
        return index // len(self.seeds)


def seeds_of(seed: int | None, n: int) -> list[int | None]:
    """Of `n` choices of a prompt. With a seed, choice i has the seed plus i, as in vLLM, modulo
    2**32, so that no two are the same."""
    if seed is None:
        return [None] * n
    first = fold_seed(seed % 2**64)
    return [(first + i) % 2**32 for i in range(n)]


async def prepare(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: Mapping[str, Any],
    seeds: Sequence[int | None],
    *,
    priority: int = 0,
    cache_salt: str = "",
) -> Choices:
    """Choices whose prompts and sampling are checked: the latter once for all of them.

    Args:
      prompts: as `EngineClient.encode` returns them.
      sampling: the fields of `request.SamplingParams` that are set, but for the seed.
      seeds: of the choices of each prompt.

    Raises:
      InvalidRequestError: what can never be served, or even an empty queue does not take them all.
      EngineError: what `EngineClient.prepare` raises.
    """
    _check_room(prompts, len(seeds), engine.limits)
    requests = await engine.client.prepare(
        prompts, sampling, priority=priority, cache_salt=cache_salt
    )
    return Choices(requests, seeds)


async def events(
    engine: Engine, answer_id: str, wanted: Choices
) -> AsyncGenerator[tuple[int, Event]]:
    """(index of the choice, event) as they happen. The first error ends all.

    Raises:
      EngineError: what `EngineClient.run` raises.
    """

    def run(index: int) -> AsyncGenerator[Event]:
        request = wanted.requests[wanted.prompt_of(index)]
        seed = wanted.seeds[index % len(wanted.seeds)]
        return engine.client.run(request, f"{answer_id}-{index}", seed)

    if len(wanted) == 1:
        async with aclosing(run(0)) as single:
            async for event in single:
                yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(len(wanted))
    errors: list[Exception] = []

    async def pass_on(index: int) -> None:
        try:
            async with aclosing(run(index)) as stream:
                async for event in stream:
                    await arrived.put((index, event))
        except Exception as error:
            errors.append(error)
            await arrived.put((index, error))

    tasks: list[asyncio.Task[None]] = []
    try:
        for index in range(len(wanted)):
            tasks.append(asyncio.create_task(pass_on(index)))
            await asyncio.sleep(0)  # to start one is quick, to start all may not be
            if errors:
                raise errors[0]
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


def _check_room(prompts: Sequence[tuple[int, ...]], n: int, limits: SchedulerConfig) -> None:
    """Choices come to the queue together, before the first of them has a row: what does not fit
    into it at once would be refused for ever, and must not look as if it might fit later."""
    num_choices = n * len(prompts)
    field, value = ("n", n) if n > 1 else ("prompt", f"a list of {len(prompts)}")
    if num_choices > limits.max_num_queued_reqs:
        raise InvalidRequestError(
            f"{field} is {value}, which makes {num_choices} choices of {len(prompts)} prompts; "
            f"allowed: at most {limits.max_num_queued_reqs} choices in one request",
            field=field,
        )
    num_tokens = n * sum(map(len, prompts))
    most = limits.max_num_queued_tokens
    if most is not None and num_choices > 1 and num_tokens > most:
        raise InvalidRequestError(
            f"{field} is {value}, which makes {num_tokens} prompt tokens in {num_choices} choices; "
            f"allowed: at most {most} in one request of several choices",
            field=field,
        )
