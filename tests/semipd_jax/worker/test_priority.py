import contextlib
import os
import threading

import pytest

from semipd_jax.worker import priority


def policies_of_threads() -> set[int]:
    policies = set[int]()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            policies.add(os.sched_getscheduler(int(thread)))
    return policies


@pytest.fixture
def second_thread():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("second_thread")
def test_every_thread_gives_way_and_comes_back():
    before = policies_of_threads()
    if not priority._may_return_to(0):
        pytest.skip("this user may not leave SCHED_IDLE")
    with priority.giving_way():
        assert policies_of_threads() == {os.SCHED_IDLE}
    assert policies_of_threads() == before


@pytest.mark.usefixtures("second_thread")
def test_no_way_down_without_a_way_back(monkeypatch):
    monkeypatch.setattr(priority, "_may_return_to", lambda _: False)
    before = policies_of_threads()
    with priority.giving_way():
        assert policies_of_threads() == before
