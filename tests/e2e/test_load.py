"""Many requests that come, go and are given up, on a pool that is too small for them."""

import asyncio
import random

from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine
from semipd_jax.request import Delta

NUM_REQUESTS = 500
POOL_BYTES = 2 << 20
"""Room for about 500 tokens of the demo model: less than eight requests that run at once want."""


def test_pages_come_back_after_500_requests_with_random_aborts(compile_cache):
    rng = random.Random(0)

    async def one(engine: AsyncEngine, i: int, start_s: float, abort_after: int | None) -> bool:
        """True if the request ended by itself."""
        await asyncio.sleep(start_s)
        prompt = [100 + (7 * i + j) % 3000 for j in range(1 + (37 * i) % 150)]
        events = engine.generate(
            prompt,
            request_id=str(i),
            max_tokens=1 + (13 * i) % 60,
            ignore_eos=True,
            seed=i,
            temperature=float(i % 2),
        )
        seen = 0
        async for event in events:
            seen += len(event.token_ids) if isinstance(event, Delta) else 0
            if abort_after is not None and seen >= abort_after:
                await events.aclose()
                return False
        return True

    async def run() -> None:
        async with AsyncEngine(
            str(MODEL_DIR),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=256,
            kv_cache_memory_bytes=POOL_BYTES,
            compile_cache_dir=compile_cache,
        ) as engine:
            jobs = [
                (i, rng.uniform(0, 3), rng.choice([None, None, 0, 1, 5, 20]))
                for i in range(NUM_REQUESTS)
            ]
            ended = await asyncio.gather(*(one(engine, *job) for job in jobs))
            assert any(ended)
            assert not all(ended)
            async with asyncio.timeout(60):  # a step that names their pages may be in flight
                while (stats := await engine.stats()).num_running or stats.num_quarantined_pages:
                    await asyncio.sleep(0.01)
            assert stats.num_free_pages == stats.num_pages
            assert stats.num_quarantined_pages == stats.num_waiting == 0
            assert stats.num_preemptions > 0, "the pool was not small enough to mean anything"
            assert stats.num_compiles == 0

    asyncio.run(run())


def test_same_seed_same_tokens_whatever_else_runs(demo_engine):
    prompt = demo_engine.generate("import os", max_tokens=1).token_ids
    options = {"temperature": 1.0, "seed": 2**40 + 5, "max_tokens": 30, "ignore_eos": True}
    alone = demo_engine.generate(prompt, **options).token_ids
    noise = [list(range(100, 100 + n)) for n in (3, 50, 200)]
    crowd = demo_engine.generate_many([*noise, prompt, prompt, *noise], **options)
    assert crowd[3].token_ids == crowd[4].token_ids == alone
    other = demo_engine.generate(prompt, **(options | {"seed": 6})).token_ids
    assert other != alone
