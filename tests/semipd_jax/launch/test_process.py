"""One child process and its pipes."""

import queue
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from fake_talker import NUM_REPORTS
from launch_rig import concurrently, config, wait_until

from semipd_jax.launch.process import Events, Exited, Process
from semipd_jax.messages import ChildSpec, FromChild, Progress, WorkerLost

SPEC = ChildSpec(name="talker", run_dir="/nowhere", config=config())
LOST = [WorkerLost(worker_id=str(i), lane="decode") for i in range(3000)]
"""More than a pipe holds, and more than the child reads at once."""


@pytest.fixture
def events() -> Events:
    return queue.SimpleQueue()


@pytest.fixture
def suspended(events) -> Iterator[Process]:
    """A child that has said what it has to say, and does not read until it is resumed."""
    process = Process("fake_talker", SPEC, events)
    for _ in range(NUM_REPORTS):
        assert isinstance(hear(events), Progress)
    psutil.Process(process.pid).suspend()
    yield process
    process.kill()
    assert process.wait(time.monotonic() + 60.0)


def hear(events: Events) -> FromChild | Exited:
    event = events.get(timeout=60.0)
    assert event is not None
    return event[1]


def tell_all(process: Process) -> None:
    for message in LOST:
        process.send(message)
    process.ask_to_stop()


def test_who_does_not_read_holds_up_nobody_and_misses_nothing(suspended, events):
    concurrently(lambda: tell_all(suspended)).result(30)
    assert not suspended.wait(time.monotonic())
    psutil.Process(suspended.pid).resume()
    for message in LOST:
        assert hear(events) == Progress(stage=str(message), done=0, total=0)
    assert hear(events) == Exited(0)


def test_who_is_killed_while_it_does_not_read_is_told_no_more(suspended, events):
    concurrently(lambda: tell_all(suspended)).result(30)
    suspended.kill()
    assert hear(events) == Exited(-9)
    wait_until(lambda: "tell talker" not in [thread.name for thread in threading.enumerate()])
    suspended.send(LOST[0])
    suspended.ask_to_stop()


def test_a_child_that_nobody_could_tell_anything_does_not_stay(events, monkeypatch):
    start = threading.Thread.start

    def fail(thread):
        if thread.name == "tell talker":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        Process("fake_talker", SPEC, events)
    assert hear(events) == Exited(-9)
