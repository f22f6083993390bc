import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from semipd_jax.client.fair_threads import FairThreads
from semipd_jax.client.line import CALLER
from semipd_jax.client.prompt import PromptEncoder
from semipd_jax.errors import UnavailableError
from semipd_jax.text.tokenizer import Tokenizer

MANY, ALONE = ("key", "host", "1"), ("key", "host", "2")
LONG = 3000  # characters


class Texts:
    """Each, known by its first character, is encoded when the test says so."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = PromptEncoder(tokenizer, LONG)
        self.begun: list[str] = []
        self._has_begun = threading.Condition()
        self._may_end = threading.Semaphore(0)

    def ask(self, caller: tuple[str, ...], name: str) -> asyncio.Task[tuple[int, ...]]:
        return asyncio.create_task(for_caller(caller, self._encoder.encode(name * LONG)))

    def encode(self, text: str, **_: object) -> list[int]:
        with self._has_begun:
            self.begun.append(text[0])
            self._has_begun.notify_all()
        assert self._may_end.acquire(timeout=60)
        return [5]

    def end(self, number: int = 1) -> None:
        self._may_end.release(number)

    async def until_begun(self, number: int) -> None:
        def wait() -> bool:
            with self._has_begun:
                return self._has_begun.wait_for(lambda: len(self.begun) >= number, 60)

        assert await asyncio.to_thread(wait)


async def for_caller[T](caller: tuple[str, ...], work: Awaitable[T]) -> T:
    CALLER.set(caller)
    return await work


@pytest.fixture
def run(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    def call(test: Callable[[Texts], Awaitable[None]]) -> None:
        async def main():
            texts = Texts(tokenizer)
            monkeypatch.setattr(Tokenizer, "encode", lambda _, text, **__: texts.encode(text))
            try:
                await test(texts)
            finally:
                texts.end(1000)
                texts._encoder.close()

        asyncio.run(main())

    return call


def test_who_is_alone_waits_for_one_job_of_the_many(run):
    async def test(texts: Texts):
        jobs = [texts.ask(MANY, "m") for _ in range(50)]
        await texts.until_begun(2)
        jobs.append(texts.ask(ALONE, "a"))
        for number in (3, 4):
            texts.end()
            await texts.until_begun(number)
        assert sorted(texts.begun) == ["a", "m", "m", "m"]
        texts.end(1000)
        assert await asyncio.gather(*jobs) == [(5,)] * 51

    run(test)


def test_who_leaves_the_line_is_passed_over(run):
    async def test(texts: Texts):
        jobs = [texts.ask(MANY, name) for name in "abcd"]
        await texts.until_begun(2)
        jobs[2].cancel()
        texts.end(1000)
        await asyncio.wait(jobs)
        assert jobs[2].cancelled()
        assert sorted(texts.begun) == ["a", "b", "d"]

    run(test)


def test_a_thread_is_taken_until_its_work_is_done_whoever_has_left(run):
    async def test(texts: Texts):
        first = [texts.ask(MANY, "m") for _ in range(2)]
        await texts.until_begun(2)
        for job in first:
            job.cancel()
        await asyncio.wait(first)
        second = texts.ask(MANY, "n"), texts.ask(MANY, "n"), texts.ask(ALONE, "a")
        await asyncio.sleep(0)
        texts.end()
        await texts.until_begun(3)
        texts.end()
        await texts.until_begun(4)
        assert sorted(texts.begun) == ["a", "m", "m", "n"]
        texts.end(1000)
        await asyncio.gather(*second)

    run(test)


@contextmanager
def busy_thread() -> Iterator[FairThreads]:
    """The only thread is busy until the end."""
    threads, is_over = FairThreads(1, "test"), threading.Event()
    running = asyncio.create_task(threads.run(partial(is_over.wait, 60)))
    try:
        yield threads
    finally:
        is_over.set()
        threads.close()
        running.cancel()


def test_those_who_leave_the_line_are_forgotten():
    async def main():
        with busy_thread() as threads:
            await asyncio.sleep(0)

            def work() -> None: ...

            waiting = asyncio.create_task(for_caller(MANY, threads.run(work)))
            left = weakref.ref(work)
            del work
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            del waiting
            assert left() is None

    asyncio.run(main())


def test_errors_come_out_and_the_next_job_is_done():
    async def main():
        threads = FairThreads(1, "test")
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0)
        assert await threads.run(lambda: 2) == 2
        threads.close()

    asyncio.run(main())


def test_closing_refuses_those_who_wait():
    async def main():
        with busy_thread() as threads:
            waiting = asyncio.create_task(threads.run(lambda: 2))
            await asyncio.sleep(0)
            threads.close()
            with pytest.raises(UnavailableError, match="closed"):
                await waiting
            with pytest.raises(UnavailableError, match="closed"):
                await threads.run(lambda: 3)

    asyncio.run(main())
