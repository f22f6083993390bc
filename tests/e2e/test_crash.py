"""`kill -9` of each process while requests run."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator

import psutil
import pytest
from e2e_processes import kill

from benchmarks.processes import engine_processes
from semipd_jax.config import Lane
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine
from semipd_jax.errors import RequestFailedError, UnavailableError
from semipd_jax.messages import Stats
from semipd_jax.request import Event

NUM_KILLS = 20
STEPS_APART = 12
"""Answered steps of a lane between a death and the next but one. Before or after the death between
them each of four requests has had a step, even if each runs alone; some were on their way."""

REQUESTS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "seed": 8, "top_p": 0.9, "frequency_penalty": 0.5},
    {"temperature": 0.7, "seed": 9, "top_k": 40, "repetition_penalty": 1.1},
]


def prompt(i: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(100, 4000) for _ in range(40 + 30 * i)]


async def drain(events: AsyncIterator[Event]) -> None:
    async for _ in events:
        pass


async def tokens_of(engine: AsyncEngine, i: int) -> tuple[int, ...]:
    options = REQUESTS[i % len(REQUESTS)]
    result = await engine.complete(prompt(i), max_tokens=200, ignore_eos=True, **options)
    return result.token_ids


def num_restarts(stats: Stats) -> int:
    return stats.num_prefill_restarts + stats.num_decode_restarts


def num_steps(stats: Stats, lane: Lane) -> int:
    return stats.num_prefill_steps if lane == "prefill" else stats.num_decode_steps


async def wait_until_known(engine: AsyncEngine, num_kills: int) -> None:
    async with asyncio.timeout(60):
        while num_restarts(await engine.stats()) < num_kills:
            await asyncio.sleep(0.01)


async def kill_some(
    engine: AsyncEngine, rng: random.Random, running: asyncio.Future, most: int
) -> int:
    """Workers, at random moments while `running`, which began with no crash. Never three of a lane
    in a row that ran the same request: it would be given up."""
    kills = 0
    lanes: tuple[Lane, ...] = ("prefill", "decode")
    last_two = {lane: deque([-STEPS_APART] * 2, maxlen=2) for lane in lanes}
    while kills < most and not running.done():
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        lane = rng.choice(lanes)
        if num_steps(await engine.stats(), lane) - last_two[lane][0] < STEPS_APART:
            continue
        if kill(f"{lane} worker 1.00"):
            kills += 1
            last_two[lane].append(num_steps(await engine.stats(), lane))
    return kills


@pytest.mark.timeout(600)
def test_streams_go_on_with_the_same_tokens_whichever_worker_dies(compile_cache):
    """A worker may die at any moment: at work, idle, or while it starts to replace another."""

    async def run() -> None:
        rng = random.Random(0)
        async with AsyncEngine(
            str(MODEL_DIR), max_num_seqs=4, max_num_batched_tokens=64,
            compile_cache_dir=compile_cache,
        ) as engine:  # fmt: skip
            undisturbed = await asyncio.gather(*(tokens_of(engine, i) for i in range(4)))
            kills = 0
            while kills < NUM_KILLS:
                running = asyncio.gather(*(tokens_of(engine, i) for i in range(4)))
                kills += await kill_some(engine, rng, running, NUM_KILLS - kills)
                assert await asyncio.wait_for(running, 240) == undisturbed
                await wait_until_known(engine, kills)
            stats = await engine.stats()
            assert num_restarts(stats) == NUM_KILLS
            assert stats.num_free_pages == stats.num_pages

    asyncio.run(run())


@pytest.mark.parametrize("name", ["memory owner", "coordinator"])
def test_death_of_what_cannot_be_replaced_ends_every_stream(compile_cache, name):
    async def run() -> None:
        async with AsyncEngine(
            str(MODEL_DIR), max_num_seqs=8, max_num_batched_tokens=64,
            compile_cache_dir=compile_cache,
        ) as engine:  # fmt: skip
            family = list(engine_processes().values())
            events = engine.generate(prompt(0), max_tokens=1000, ignore_eos=True)
            await anext(events)
            engine_processes()[name].kill()
            with pytest.raises((RequestFailedError, UnavailableError)):
                await asyncio.wait_for(drain(events), 60)
        assert not psutil.wait_procs(family, timeout=60)[1]

    asyncio.run(run())
