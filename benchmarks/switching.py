"""What running streams notice when a phase moves to another share. All times are in seconds."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import numpy as np

from semipd_jax.engine import AsyncEngine
from semipd_jax.request import Delta

_GAPS: Final = 4
"""A move shows within the steps that were in flight when it was asked for and the next one."""


class Streams:
    """Requests that decode without end, and the moment of every token of the first one."""

    def __init__(self, engine: AsyncEngine, num_streams: int) -> None:
        self.times: list[float] = []
        self._engine = engine
        self._tasks = [asyncio.ensure_future(self._run(i)) for i in range(num_streams)]
        self._tasks.append(asyncio.ensure_future(self._prefill()))

    async def _run(self, index: int) -> None:
        while True:
            prompt = [5 + index, 6, 7]
            async for event in self._engine.generate(prompt, max_tokens=1500, ignore_eos=True):
                if index == 0 and isinstance(event, Delta):
                    self.times.append(time.monotonic())

    async def _prefill(self) -> None:
        """Keeps both phases at work: one that is alone would not leave its largest share."""
        for i in range(10**9):
            await self._engine.complete([i % 1000, 9, 8], max_tokens=1)

    async def tokens(self, count: int) -> None:
        """Returns when that many more have come. Raises what ended a stream."""
        wanted = len(self.times) + count
        while len(self.times) < wanted:
            await asyncio.sleep(0.001)
            for task in self._tasks:
                if task.done():
                    task.result()

    async def longest_gap(self) -> float:
        """Of the next few gaps."""
        first = len(self.times) - 1
        await self.tokens(_GAPS)
        return float(np.diff(self.times[first : first + _GAPS + 1]).max())

    async def gaps_while(self, action: Callable[[], Awaitable[object]]) -> list[float]:
        """All gaps that lie within what `action` does."""
        first = len(self.times)
        await action()
        return np.diff(self.times[first:]).tolist()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def moves_and_none(
    engine: AsyncEngine, streams: Streams, rungs: tuple[float, float], count: int, seed: int
) -> tuple[list[float], list[float]]:
    """The longest gap after each of `count` moves of decode to the other rung, and after as many
    moments without a move, in random order."""
    rng = random.Random(seed)
    moved: list[float] = []
    stayed: list[float] = []
    rung = 0
    plan = [moved, stayed] * count
    rng.shuffle(plan)
    for found in plan:
        await streams.tokens(rng.randrange(2, 6))
        rung ^= found is moved
        await engine.set_partition(decode=rungs[rung])
        found.append(await streams.longest_gap())
    return moved, stayed


async def start_beside(
    engine: AsyncEngine, streams: Streams, share: float, back_to: float, quiet_s: float
) -> tuple[list[float], list[float]]:
    """Gaps while a worker at `share` starts and decode moves to it and back; and those of a quiet
    time before and after."""

    async def change() -> None:
        await engine.set_partition(decode=share)
        while share not in (await engine.partition()).decode.warm:
            await asyncio.sleep(0.1)
        await streams.tokens(20)
        await engine.set_partition(decode=back_to)
        await streams.tokens(20)

    before = await streams.gaps_while(lambda: asyncio.sleep(quiet_s))
    changing = await streams.gaps_while(change)
    after = await streams.gaps_while(lambda: asyncio.sleep(quiet_s))
    return changing, before + after


async def every_so_often(
    engine: AsyncEngine,
    streams: Streams,
    rungs: Sequence[float],
    *,
    every_s: float,
    seconds: float,
    slice_s: float = 5.0,
) -> tuple[list[float], list[float]]:
    """Gaps while both phases move to another of the rungs every `every_s`, for `seconds` in all,
    and while they stay, in turns of `slice_s`."""
    changing: list[float] = []
    staying: list[float] = []
    step = 0

    async def change() -> None:
        nonlocal step
        end_s = time.monotonic() + slice_s
        while time.monotonic() < end_s:
            step += 1
            prefill, decode = (rungs[(step + i) % len(rungs)] for i in range(2))
            await engine.set_partition(prefill=prefill, decode=decode)
            await asyncio.sleep(every_s)

    for _ in range(round(seconds / slice_s)):
        changing += await streams.gaps_while(change)
        await engine.set_partition(prefill=rungs[-1], decode=rungs[-1])
        staying += await streams.gaps_while(lambda: asyncio.sleep(slice_s))
    return changing, staying
