import asyncio
from bisect import bisect_left
from contextlib import aclosing, asynccontextmanager

import pytest
from fake_coordinator import TIMINGS, FakeCoordinator, layout
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.client import EngineClient
from semipd_jax.client.observations import Histogram, Observations, RequestTimes, one_two_five
from semipd_jax.config import ModelConfig
from semipd_jax.errors import EngineError
from semipd_jax.request import Event, FinishReason, Timings
from semipd_jax.text.tokenizer import Tokenizer


@asynccontextmanager
async def serving(run_dir: str, tokenizer: Tokenizer, **fields):
    client = EngineClient(run_dir, layout(), tokenizer, ModelConfig(path="tiny"), {})
    with FakeCoordinator(run_dir, **fields) as fake:
        await client.start()
        try:
            yield client, fake
        finally:
            await client.close()


async def run(client: EngineClient, fake: FakeCoordinator, sampling: dict) -> list[Event]:
    async def read() -> list[Event]:
        return [event async for event in client.generate([5, 6, 7], sampling)]

    reader = asyncio.ensure_future(read())
    await fake.until(reader.done)
    return reader.result()


@given(st.lists(st.floats(0.0, 10.0)), st.lists(st.floats(0.1, 9.0), min_size=1, unique=True))
def test_a_histogram_counts_every_value_once(values: list[float], bounds: list[float]):
    bounds.sort()
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(value <= bound for value in values)


def test_bounds_of_lengths():
    assert one_two_five(64) == [1, 2, 5, 10, 20, 50]
    assert one_two_five(100)[-1] == 100


def test_intervals_are_vllms():
    """TTFT from the arrival, ITL between tokens, TPOT without the first token."""
    now = 10.0
    seen = Observations(1000, clock=lambda: now)
    times = RequestTimes(now)
    for now_s in (10.5, 10.75, 11.5):
        seen.token(times, now_s)
    now = 12.0
    seen.ended(times, 7, FinishReason.LENGTH, Timings(0.1, 0.2, 0.3))
    assert seen.ttft_s.sum == 0.5
    assert seen.itl_s.sum == 1.0
    assert sum(seen.itl_s.counts) == 2
    assert seen.tpot_s.sum == 0.5
    assert seen.e2e_s.sum == 2.0
    assert seen.inference_s.sum == pytest.approx(0.5)
    assert seen.ttft_s.counts[bisect_left(seen.ttft_s.bounds, 0.5)] == 1


def test_what_a_client_observes(run_dir: str, tokenizer: Tokenizer):
    async def main():
        async with serving(run_dir, tokenizer) as (client, fake):
            seen = client.observations
            await run(client, fake, {"max_tokens": 4})
            await run(client, fake, {"max_tokens": 1})
            assert (seen.num_prompt_tokens, seen.num_output_tokens) == (6, 5)
            assert sum(seen.ttft_s.counts) == 2
            assert sum(seen.itl_s.counts) == 3
            assert sum(seen.tpot_s.counts) == 1
            assert seen.finished == {"length": 2, "stop": 0, "abort": 0, "error": 0}
            assert seen.queue_s.sum == pytest.approx(2 * TIMINGS.queue_s)
            assert seen.request_output_tokens.sum == 5
            assert 0 < seen.ttft_s.sum <= seen.e2e_s.sum

    asyncio.run(main())


def test_every_request_ends_in_one_count(run_dir: str, tokenizer: Tokenizer):
    async def main():
        async with serving(run_dir, tokenizer) as (client, fake):
            seen = client.observations
            async with aclosing(client.generate([5], {"max_tokens": 100})) as events:
                first = asyncio.ensure_future(anext(events))
                await fake.until(first.done, stepping=False)
            assert seen.finished["abort"] == 1
            fake.fail_after = 1
            with pytest.raises(EngineError):
                await run(client, fake, {"max_tokens": 9})
            assert seen.finished["error"] == 1
            fake.refuse = "full"
            with pytest.raises(EngineError):
                await run(client, fake, {})
            with pytest.raises(EngineError):
                await run(client, fake, {"top_p": 9.0})
            assert seen.refused == {"invalid": 1, "overloaded": 1, "unavailable": 0}
            fake.refuse = fake.fail_after = None
            waiting = asyncio.ensure_future(run(client, fake, {"max_tokens": 100}))
            await fake.until(lambda: bool(fake.running))
            client.connection_lost(EngineError("gone"))
            with pytest.raises(EngineError):
                await waiting
            with pytest.raises(EngineError):
                await run(client, fake, {})
            assert seen.finished == {"length": 0, "stop": 0, "abort": 1, "error": 2}
            assert seen.refused == {"invalid": 1, "overloaded": 1, "unavailable": 1}

    asyncio.run(main())


def test_tokens_behind_a_stop_string_are_not_counted(run_dir: str, tokenizer: Tokenizer):
    words = tokenizer.encode("one two three four", add_special_tokens=False)

    async def main():
        async with serving(run_dir, tokenizer, answer=lambda _, i: words[i % len(words)]) as (
            client,
            fake,
        ):
            events = await run(client, fake, {"stop": ["two"], "max_tokens": 50})
            finished = events[-1]
            assert client.observations.finished["stop"] == 1
            assert client.observations.num_output_tokens == finished.usage.completion_tokens

    asyncio.run(main())
