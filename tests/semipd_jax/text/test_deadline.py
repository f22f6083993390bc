import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import pytest

from semipd_jax.text import deadline
from semipd_jax.text.deadline import Deadlines

DEADLINES = Deadlines()


def endless() -> None:
    for _ in count():
        pass


def test_what_ends_in_time_is_told():
    assert DEADLINES.within(60.0, lambda: 7) == 7
    with pytest.raises(KeyError):
        DEADLINES.within(60.0, lambda: {}["x"])


def test_an_endless_loop_ends():
    with pytest.raises(TimeoutError):
        DEADLINES.within(0.05, endless)


def test_code_that_catches_everything_ends():
    caught: list[BaseException] = []

    def stubborn() -> None:
        while len(caught) < 3:
            try:
                endless()
            except BaseException as error:
                caught.append(error)
        endless()

    with pytest.raises(TimeoutError):
        DEADLINES.within(0.05, stubborn)
    assert len(caught) == 3


def test_a_shorter_deadline_does_not_wait_for_a_longer_one():
    is_over = threading.Event()
    begun = threading.Event()

    def long() -> bool:
        begun.set()
        return is_over.wait(120)

    thread = threading.Thread(target=lambda: DEADLINES.within(120.0, long))
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(TimeoutError):
            DEADLINES.within(0.05, endless)
        assert thread.is_alive()
    finally:
        is_over.set()
        thread.join(60)


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before_s)


def busy(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


@pytest.mark.usefixtures("frequent_switches")
def test_nothing_is_raised_once_the_call_has_returned():
    """Of calls that end about when their time is over."""
    ends: list[str] = []
    near_s = [0.002 + (i % 41 - 20) * 1e-5 for i in range(600)]
    for seconds in (0.0, *near_s, 1.0):
        try:
            DEADLINES.within(0.002, lambda seconds=seconds: busy(seconds))
            ends.append("done")
        except TimeoutError:
            ends.append("over")
        busy(0.0002)
    assert len(ends) == 602
    assert set(ends) == {"done", "over"}


def test_what_is_sent_while_a_call_returns_does_not_arrive(monkeypatch: pytest.MonkeyPatch):
    returns, send = threading.Event(), deadline._send

    def late(thread_id: int, exception: object) -> None:
        returns.set()
        time.sleep(0.1)  # in which the call gets as far as it can
        send(thread_id, exception)

    monkeypatch.setattr(deadline, "_send", late)
    with suppress(TimeoutError):
        Deadlines().within(0.05, lambda: returns.wait(60))
    assert returns.is_set()


def test_no_thread_is_traced():
    """Which would slow them."""
    before = sys.gettrace()
    assert DEADLINES.within(60.0, sys.gettrace) is before
