"""Replies of steps in flight, with steps that this test ends."""

import threading

import pytest

from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.worker.loop import Completer


class Step:
    """In flight until `end` is set; then it gives tokens or raises."""

    def __init__(self, step_id, error=None):
        self.step_id = step_id
        self.dispatched_s = 0.0
        self.end = threading.Event()
        self._error = error

    def wait(self):
        assert self.end.wait(10)
        if self._error is not None:
            raise self._error
        return bytes([self.step_id] * 4), None


def test_steps_in_flight_are_finished_and_answered_in_order():
    completer = Completer(CompileCounter(), "worker")
    steps = [Step(1), Step(2)]
    for step in steps:
        completer.add(step)
    assert completer.take() == []
    threading.Timer(0.05, steps[0].end.set).start()
    steps[1].end.set()
    replies = completer.finish(10)
    assert [(r.worker_id, r.step_id, r.token_ids) for r in replies] == [
        ("worker", 1, b"\1\1\1\1"),
        ("worker", 2, b"\2\2\2\2"),
    ]
    assert all(r.device_s >= 0 for r in replies)


def test_what_a_step_raises_reaches_the_main_thread():
    completer = Completer(CompileCounter(), "worker")
    step = Step(1, ArithmeticError("device fault"))
    step.end.set()
    completer.add(step)
    with pytest.raises(ArithmeticError, match="device fault"):
        completer.finish(10)


def test_steps_that_do_not_end_are_not_waited_for_for_ever():
    completer = Completer(CompileCounter(), "worker")
    stuck = Step(1)
    completer.add(stuck)
    with pytest.raises(TimeoutError, match=r"did not end within 0.05 s"):
        completer.finish(0.05)
    stuck.end.set()
