"""Replies of steps in flight, with steps that this test ends."""

import os
import threading
import time

import numpy as np
import pytest

from semipd_jax.child import Child
from semipd_jax.config import EngineConfig, ModelConfig
from semipd_jax.messages import ChildSpec, DecodeStep, FromWorker, ToWorker, WorkerReady
from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.runtime.runner import PendingStep, StepRunner
from semipd_jax.runtime.sampling import StepOutput
from semipd_jax.transport.channels import WORKERS, Hub, Link, Poller
from semipd_jax.worker.loop import Completer, serve


class Tokens:
    """A result on the device until `end` is set; then it is there, or `error` is."""

    def __init__(self, token_id, error=None):
        self.end = threading.Event()
        self._token_id = token_id
        self._error = error

    def __array__(self, dtype=None, copy=None):
        assert self.end.wait(60)
        if self._error is not None:
            raise self._error
        return np.array([self._token_id], np.int32)


def pending(step_id, tokens):
    output = StepOutput(token_ids=tokens, logprobs=None, top_ids=None, top_logprobs=None)
    return PendingStep(step_id, np.arange(1), False, output, time.monotonic())


def test_steps_in_flight_are_finished_and_answered_in_order():
    began = time.monotonic()
    completer = Completer(CompileCounter(), "worker")
    first, second = Tokens(11), Tokens(12)
    completer.add(pending(1, first))
    completer.add(pending(2, second))
    assert list(completer.take()) == []
    threading.Timer(0.5, first.end.set).start()
    second.end.set()
    replies = list(completer.finish(60.0))
    assert [(r.worker_id, r.step_id) for r in replies] == [("worker", 1), ("worker", 2)]
    assert [np.frombuffer(r.token_ids, np.int32).tolist() for r in replies] == [[11], [12]]
    assert replies[0].device_s > 0.4
    took_s = time.monotonic() - began
    assert sum(r.device_s for r in replies) <= took_s  # the second starts when the first has ended


def test_what_a_step_raises_reaches_the_main_thread():
    completer = Completer(CompileCounter(), "worker")
    tokens = Tokens(1, ArithmeticError("device fault"))
    tokens.end.set()
    completer.add(pending(1, tokens))
    with pytest.raises(ArithmeticError, match="device fault"):
        list(completer.finish(60.0))


def test_steps_before_one_that_fails_are_answered():
    """Else its crash is counted against the first of them."""
    completer = Completer(CompileCounter(), "worker")
    first, second = Tokens(11), Tokens(12, ArithmeticError("device fault"))
    for step_id, tokens in enumerate((first, second), 1):
        tokens.end.set()
        completer.add(pending(step_id, tokens))
    replies = completer.finish(60.0)
    assert next(replies).step_id == 1
    with pytest.raises(ArithmeticError, match="device fault"):
        next(replies)


class Runner(StepRunner):
    """Its first step is in flight until the second one cannot be dispatched."""

    def __init__(self):
        self._first = Tokens(11)

    def dispatch(self, step):
        if step.step_id == 1:
            return pending(1, self._first)
        self._first.end.set()
        raise ValueError("no bucket holds the step")


def test_a_step_in_flight_is_answered_if_the_next_one_cannot_be_dispatched(tmp_path):
    tmp_path.chmod(0o700)
    hub = Hub[FromWorker, ToWorker](str(tmp_path), WORKERS, FromWorker)
    link = Link[ToWorker, FromWorker](str(tmp_path), WORKERS, "worker", ToWorker)
    link.send(WorkerReady("worker", "decode", 1.0))
    ready, _ = receive(hub), [hub.send("worker", step(i)) for i in (1, 2)]
    assert isinstance(ready, WorkerReady)
    config = EngineConfig(model=ModelConfig(path="x"))
    spec = ChildSpec(name="worker", run_dir=str(tmp_path), config=config)
    with open(os.devnull, "w") as nobody, pytest.raises(ValueError, match="no bucket"):
        serve(Child(spec, nobody.fileno()), link, Runner(), CompileCounter(), "worker")
    assert receive(hub).step_id == 1
    link.close()
    hub.close()


def receive(hub):
    poller = Poller()
    poller.add(hub)
    poller.wait(60.0)
    return next(hub.receive())[1]


def step(step_id):
    return DecodeStep(step_id, b"", b"", 0, b"", b"")


def test_steps_that_do_not_end_are_not_waited_for_for_ever():
    completer = Completer(CompileCounter(), "worker")
    tokens = Tokens(1)
    completer.add(pending(1, tokens))
    with pytest.raises(TimeoutError, match=r"did not end within 0.05 s"):
        completer.finish(0.05)
    tokens.end.set()
    completer.finish(60.0)  # its thread ends
