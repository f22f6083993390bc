"""The library between its callers' threads and its event loop, without the processes behind."""

import asyncio
import gc
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from semipd_jax import engine as engine_module
from semipd_jax.engine import AsyncEngine, Engine
from semipd_jax.errors import EngineError, UnavailableError

TIMEOUT_S = 30.0


class FakeEngine(AsyncEngine):
    async def start(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "AsyncEngine", FakeEngine)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine("absent") as engine:
        yield engine


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


async def answer() -> int:
    return 5


async def never() -> None:
    await asyncio.Event().wait()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupt_at(number: int) -> Callable[[FrameType, str, object], Any]:
    """Traces a thread, and interrupts it before one of the lines that it runs. Those of type
    checkers do not count, nor what it does because of an error."""
    numbers = itertools.count(1)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if "site-packages" in path or path.startswith("<"):
            return None
        if event == "line" and sys.exception() is None and next(numbers) == number:
            raise KeyboardInterrupt
        return trace

    return trace


def test_an_interrupt_before_any_line_ends_the_call_and_nothing_else(engine: Engine):
    for number in itertools.count(1):
        sys.settrace(interrupt_at(number))
        try:
            engine._run(never, timeout_s=0.0)
        except KeyboardInterrupt:
            pass
        except TimeoutError:
            break
        finally:
            sys.settrace(None)
        assert engine._run(answer, timeout_s=5.0) == 5
        until(lambda: not asyncio.all_tasks(engine._loop))
    assert number > 20


def test_who_waits_for_an_engine_that_is_stopped_is_told(
    engine: Engine, threads: ThreadPoolExecutor
):
    has_begun = threading.Event()

    async def work() -> None:
        has_begun.set()
        await never()

    waiting = threads.submit(engine._run, work, timeout_s=None)
    assert has_begun.wait(TIMEOUT_S)
    engine.stop()
    with pytest.raises(UnavailableError, match="stopped"):
        waiting.result(TIMEOUT_S)


@pytest.mark.parametrize("is_lost", [False, True], ids=["refused", "lost"])
def test_who_asks_an_engine_that_is_being_stopped_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, is_lost: bool
):
    hand_over = engine._loop.call_soon_threadsafe

    def stopped_meanwhile(callback: Callable[[], object]) -> None:
        monkeypatch.undo()
        engine.stop()
        if not is_lost:
            hand_over(callback)

    monkeypatch.setattr(engine._loop, "call_soon_threadsafe", stopped_meanwhile)
    with pytest.raises(UnavailableError, match="stopped"):
        engine._run(answer, timeout_s=TIMEOUT_S)


def test_an_interrupt_while_the_engine_is_stopped_remains_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(_: Callable[[], object]) -> None:
        monkeypatch.undo()
        engine.stop()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine._run(answer, timeout_s=TIMEOUT_S)


def test_two_threads_may_stop_at_the_same_time(
    engine: Engine, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
):
    """The second is still waiting when the first has ended everything."""
    numbers, has_second = itertools.count(1), asyncio.Event()

    async def stop(_: AsyncEngine) -> None:
        if next(numbers) == 1:
            await has_second.wait()
        else:
            has_second.set()
            await never()

    monkeypatch.setattr(FakeEngine, "stop", stop)
    stops = [threads.submit(engine.stop) for _ in range(2)]
    assert [stop.result(TIMEOUT_S) for stop in stops] == [None, None]


def test_stopping_takes_its_time(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    async def stop(_: AsyncEngine) -> None:
        await asyncio.sleep(3.0)

    monkeypatch.setattr(engine_module, "_CALL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(FakeEngine, "stop", stop)
    engine.stop()
    assert engine._loop.is_closed()


def test_the_engine_s_own_thread_may_stop_it_and_waits_for_nothing(engine: Engine):
    errors: list[Exception] = []

    def call() -> None:
        try:
            engine.stats()
        except Exception as error:
            errors.append(error)
        engine.stop()

    engine._loop.call_soon_threadsafe(call)
    until(engine._loop.is_closed)
    assert [type(error) for error in errors] == [EngineError]


def test_an_engine_that_its_own_thread_collects_ends():
    engine = Engine("absent")
    loop, cycle = engine._loop, [engine]
    cycle.append(cycle)
    del engine, cycle
    loop.call_soon_threadsafe(gc.collect)
    until(loop.is_closed)
