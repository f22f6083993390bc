"""Modes with one worker for both phases, on real engines: the tokens are those of mode semi-pd."""

import asyncio
import random

import pytest
from e2e_processes import kill

from benchmarks.processes import engine_processes
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine

LIMITS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2 << 20,  # room for about 500 tokens: requests are preempted
}
NUM_REQUESTS = 24
NUM_KILLS = 3


def job(i: int) -> tuple[list[int], dict]:
    """A prompt that begins like others, and sampling; greedy and seeded take turns."""
    rng = random.Random(i)
    shared = random.Random(i % 2)
    prompt = [shared.randrange(100, 4000) for _ in range(rng.choice([0, 40, 70]))]
    prompt += [rng.randrange(100, 4000) for _ in range(rng.randint(1, 120))]
    sampling = {"temperature": 0.0} if i % 3 else {"temperature": 0.8, "seed": i}
    return prompt, {"max_tokens": rng.randint(20, 60), "ignore_eos": True, **sampling}


async def all_tokens(engine: AsyncEngine) -> list[tuple[int, ...]]:
    """Of requests that come one after another, in any state of those before."""

    async def one(i: int) -> tuple[int, ...]:
        await asyncio.sleep(0.02 * i)
        prompt, sampling = job(i)
        return (await engine.complete(prompt, **sampling)).token_ids

    return await asyncio.gather(*map(one, range(NUM_REQUESTS)))


def engine_of(mode: str, compile_cache: str, **options) -> AsyncEngine:
    limits = LIMITS | {"mode": mode, "compile_cache_dir": compile_cache}
    return AsyncEngine(str(MODEL_DIR), **limits, **options)


async def check_idle(engine: AsyncEngine) -> None:
    stats = await engine.stats()
    assert stats.num_preemptions > 0, "the pool was not small enough to mean anything"
    assert stats.num_free_pages == stats.num_pages
    assert stats.num_compiles == 0


@pytest.fixture(scope="module")
def expected(compile_cache) -> list[tuple[int, ...]]:
    async def run() -> list[tuple[int, ...]]:
        async with engine_of("semi-pd", compile_cache) as engine:
            return await all_tokens(engine)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("mode", "caching"), [("colocated", True), ("chunked", False)], ids=["colocated", "chunked"]
)
def test_tokens_are_those_of_semi_pd(compile_cache, expected, mode, caching):
    async def run() -> None:
        async with engine_of(mode, compile_cache, enable_prefix_caching=caching) as engine:
            assert f"{mode} worker 1.00" in engine_processes()
            assert await all_tokens(engine) == expected
            await check_idle(engine)

    asyncio.run(run())


@pytest.mark.timeout(600)
def test_a_worker_with_mixed_steps_may_die_at_any_moment(compile_cache, expected):
    async def kill_some(rng: random.Random) -> None:
        for _ in range(NUM_KILLS):
            await asyncio.sleep(rng.uniform(0.2, 0.6))
            while not kill("chunked worker 1.00"):
                await asyncio.sleep(0.05)

    async def run() -> None:
        async with engine_of("chunked", compile_cache) as engine:
            killing = asyncio.ensure_future(kill_some(random.Random(0)))
            assert await all_tokens(engine) == expected
            await killing
            assert await all_tokens(engine) == expected
            await check_idle(engine)
            stats = await engine.stats()
            assert stats.num_prefill_restarts == stats.num_decode_restarts == NUM_KILLS

    asyncio.run(run())
