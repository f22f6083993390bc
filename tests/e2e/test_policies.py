"""Policies on real engines: they move shares, and no token depends on it."""

import asyncio
from contextlib import aclosing

import pytest
from modelled_profile import save_profile

from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine
from semipd_jax.errors import InvalidRequestError
from semipd_jax.messages import Stats

NUM_REQUESTS = 12
PROMPT = list(range(100, 400))


async def tokens_of(engine: AsyncEngine, i: int) -> tuple[int, ...]:
    prompt = PROMPT[: 20 + 20 * i]
    result = await engine.complete(prompt, max_tokens=40, temperature=0.0, ignore_eos=True)
    return result.token_ids


async def all_tokens(engine: AsyncEngine) -> list[tuple[int, ...]]:
    return await asyncio.gather(*(tokens_of(engine, i) for i in range(NUM_REQUESTS)))


@pytest.mark.timeout(600)
def test_policies_change_no_token_and_can_be_changed(compile_cache, tmp_path):
    async def run() -> None:
        async with AsyncEngine(
            str(MODEL_DIR), max_num_seqs=8, max_num_batched_tokens=64, share_ladder=(0.5,),
            enable_prefix_caching=False, compile_cache_dir=compile_cache,
            slo_ttft_ms=1000, slo_tpot_ms=20, tuner_profile=save_profile(tmp_path / "p.json"),
            policy="static",
        ) as engine:  # fmt: skip
            static = await all_tokens(engine)
            assert (await engine.partition()).policy == "static"
            for policy in ("predictive", "semi-pd", "semi-pd-replan"):
                partition = await engine.set_partition(policy=policy)
                assert partition.policy == policy
                assert await all_tokens(engine) == static
                assert (await engine.partition()).choice is not None
            await check_moves(engine, static)
            await check_predictions(engine)
            await check_watch(engine)
            await check_promises(engine)

    asyncio.run(run())


async def check_moves(engine: AsyncEngine, expected: list[tuple[int, ...]]) -> None:
    """Out of reach, the promise has prefill give way while others decode."""
    await engine.set_partition(policy="predictive")
    await engine.set_slo(ttft_ms=1000, tpot_ms=0.001)
    before = (await engine.partition()).prefill.num_switches
    assert await all_tokens(engine) == expected
    assert (await engine.partition()).prefill.num_switches > before
    await engine.set_slo(ttft_ms=1000, tpot_ms=20)


async def check_predictions(engine: AsyncEngine) -> None:
    await engine.set_partition(policy="predictive")
    await all_tokens(engine)
    stats = await engine.stats()
    assert stats.prefill_error.count > 5
    assert stats.decode_error.count > 20
    partition = await engine.set_partition(prefill=1.0, decode=0.5)
    assert (partition.policy, partition.decode.asked) == ("static", 0.5)


async def check_watch(engine: AsyncEngine) -> None:
    async with aclosing(engine.watch(interval_s=0.05)) as watch:
        first, second = await anext(watch), await anext(watch)
    assert second.time_s - first.time_s >= 0.05
    assert second.partition.policy == first.partition.policy == "static"


async def check_promises(engine: AsyncEngine) -> None:
    before = await engine.stats()
    await engine.set_slo(ttft_ms=60_000, tpot_ms=60_000)
    await all_tokens(engine)
    kept = await engine.stats()
    assert met(kept) - met(before) == NUM_REQUESTS
    await engine.set_slo(ttft_ms=0.001, tpot_ms=60_000)
    await all_tokens(engine)
    broken = await engine.stats()
    assert met(broken) == met(kept)
    assert broken.slo.num_tpot_met - kept.slo.num_tpot_met == NUM_REQUESTS
    assert broken.slo.num_ended - before.slo.num_ended == 2 * NUM_REQUESTS
    assert broken.num_compiles == 0
    await engine.set_partition(policy="predictive")
    with pytest.raises(InvalidRequestError, match="slo_tpot_ms is None"):
        await engine.set_slo(ttft_ms=100)


def met(stats: Stats) -> int:
    return stats.slo.num_met
