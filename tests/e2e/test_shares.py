"""Shares that change while requests run, with real workers."""

import asyncio
import random

import pytest

from benchmarks.processes import engine_processes
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine

MIN_STEPS = 900  # 259 of prefill and 645 of decode with full batches
NUM_REQUESTS = 40


def prompt(i: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(100, 4000) for _ in range(rng.randrange(1, 800))]


async def tokens_of(engine: AsyncEngine, i: int) -> tuple[int, ...]:
    options = {"temperature": 0.0} if i % 2 else {"temperature": 0.8, "seed": i}
    result = await engine.complete(prompt(i), max_tokens=130, ignore_eos=True, **options)
    return result.token_ids


@pytest.mark.timeout(600)
def test_shares_that_change_all_the_time_change_no_token(compile_cache):
    async def change(engine: AsyncEngine, done: asyncio.Event) -> None:
        rng = random.Random(0)
        while not done.is_set():
            prefill, decode = rng.choices([0.5, 1.0], k=2)
            await engine.set_partition(prefill=prefill, decode=decode)
            await asyncio.sleep(0.005)  # about a step: a move waits for those in flight

    async def run() -> None:
        async with AsyncEngine(
            str(MODEL_DIR), max_num_seqs=8, max_num_batched_tokens=64, share_ladder=(0.5,),
            enable_prefix_caching=False, compile_cache_dir=compile_cache,
        ) as engine:  # fmt: skip
            undisturbed = await asyncio.gather(*(tokens_of(engine, i) for i in range(NUM_REQUESTS)))
            before = await engine.stats()
            done = asyncio.Event()
            changing = asyncio.ensure_future(change(engine, done))
            assert await asyncio.gather(*(tokens_of(engine, i) for i in range(NUM_REQUESTS))) == (
                undisturbed
            )
            done.set()
            await changing
            stats, shares = await engine.stats(), await engine.partition()
            num_steps = stats.num_prefill_steps + stats.num_decode_steps
            assert num_steps - before.num_prefill_steps - before.num_decode_steps >= MIN_STEPS
            assert min(shares.prefill.num_switches, shares.decode.num_switches) >= 20
            assert stats.num_free_pages == stats.num_pages
            assert stats.num_compiles == 0

    asyncio.run(run())


@pytest.mark.timeout(600)
def test_a_share_beside_the_ladder_takes_over_while_streams_go_on(compile_cache):
    async def run() -> None:
        async with AsyncEngine(
            str(MODEL_DIR), max_num_seqs=8, max_num_batched_tokens=64,
            compile_cache_dir=compile_cache,
        ) as engine:  # fmt: skip
            undisturbed = await tokens_of(engine, 1)
            await engine.set_partition(decode=0.5)
            while 0.5 not in (await engine.partition()).decode.warm:
                assert await tokens_of(engine, 1) == undisturbed
            assert "decode worker 0.50" in engine_processes()
            await engine.set_partition(decode=1.0)
            assert await tokens_of(engine, 1) == undisturbed
            while "decode worker 0.50" in engine_processes():
                await asyncio.sleep(0.1)

    asyncio.run(run())
