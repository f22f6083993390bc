"""The running worker: steps go to the device as they arrive, replies leave as they end.

The main thread owns the socket. It dispatches every step at once, so that the next one is queued on
the device before the last one ends; a second thread waits for results, oldest first. A step that
fails ends the process once those before it are answered: the coordinator gives the others to the
replacement, and blames the oldest of them.
"""

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

from semipd_jax.child import Child
from semipd_jax.messages import FromWorker, StepDone, ToWorker
from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.runtime.runner import PendingStep, StepRunner
from semipd_jax.transport.channels import Link, Poller

_TICK_S: Final = 1.0


def serve(
    child: Child,
    link: Link[ToWorker, FromWorker],
    runner: StepRunner,
    compiles: CompileCounter,
    worker_id: str,
) -> None:
    """Runs steps until the child is stopped or one cannot be dispatched, then finishes those in
    flight.

    Raises what a step raised, or TimeoutError if the last steps do not end within the step timeout.
    """
    completer = Completer(compiles, worker_id)
    poller = Poller()
    for source in (link, completer.fileno(), child.fileno()):
        poller.add(source)
    try:
        while not child.stopping.is_set():
            poller.wait(_TICK_S)
            for reply in completer.take():
                link.send(reply)
            while (message := link.receive(0.0)) is not None:
                completer.add(runner.dispatch(message))
    finally:
        for reply in completer.finish(child.spec.config.timeouts.step_s):
            link.send(reply)


class Completer:
    """Waits for steps on a thread of its own and turns them into replies, in order."""

    def __init__(self, compiles: CompileCounter, worker_id: str) -> None:
        self._compiles = compiles
        self._worker_id = worker_id
        self._pending: queue.SimpleQueue[PendingStep | None] = queue.SimpleQueue()
        self._finished: deque[StepDone | Exception] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="completer", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return self._wake_fd

    def add(self, step: PendingStep) -> None:
        self._pending.put(step)

    def take(self) -> Iterator[StepDone]:
        """Replies of the steps that have ended. Raises what a step raised, after the replies of
        those before it."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._finished:
            result = self._finished.popleft()
            if isinstance(result, Exception):
                raise result
            yield result

    def finish(self, timeout_s: float) -> Iterator[StepDone]:
        """Waits for all steps; then as `take`. Raises TimeoutError if that takes too long."""
        self._pending.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"steps in flight did not end within {timeout_s} s")
        return self.take()

    def _run(self) -> None:
        end_s = 0.0
        try:
            while (step := self._pending.get()) is not None:
                token_ids, logprobs = step.wait()
                start_s, end_s = max(step.dispatched_s, end_s), time.monotonic()
                self._put(
                    StepDone(
                        worker_id=self._worker_id,
                        step_id=step.step_id,
                        token_ids=token_ids,
                        device_s=end_s - start_s,
                        num_compiles=self._compiles.count,
                        logprobs=logprobs,
                    )
                )
        except Exception as error:
            self._put(error)

    def _put(self, result: StepDone | Exception) -> None:
        self._finished.append(result)
        os.eventfd_write(self._wake_fd, 1)
