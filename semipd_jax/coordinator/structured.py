"""Threads that compile grammars and make masks, so that neither holds up the coordinator's loop.

A mask takes 10 to 100 µs as a rule, but a client can write a grammar whose masks take a hundred
times that. So the loop hands the work over, waits a moment for what is quick, and goes on without
what is not: rows whose mask is late take part in a later step. llguidance works without the
interpreter lock.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from semipd_jax.grammar.grammars import Grammars, field_of
from semipd_jax.grammar.matcher import GrammarError, Matcher
from semipd_jax.request import Request
from semipd_jax.scheduler.state import Constraint, RequestState

_NUM_MASK_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request may be queued with this constraint; or it never can, because of its `field`."""

    client: str
    handle: int
    request: Request
    constraint: Constraint | None
    error: str = ""
    field: str = ""


@dataclass(frozen=True, slots=True)
class Masked:
    """The arguments of `Scheduler.mask_made`."""

    request: RequestState
    mask: bytes | None
    error: str | None = None


@runtime_checkable
class MaskMaker(Protocol):
    """What the coordinator needs of `GrammarThreads`."""

    def compile(
        self, client: str, handle: int, request: Request, is_wanted: Callable[[], bool]
    ) -> None: ...

    def advance(self, request: RequestState, token_id: int) -> None: ...

    def take(self, wait_s: float = 0.0) -> list[Compiled | Masked]: ...


class GrammarThreads:
    """Daemon threads; used from one thread."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._compile_jobs: queue.SimpleQueue[Callable[[], Compiled | None]] = queue.SimpleQueue()
        self._mask_jobs: queue.SimpleQueue[Callable[[], Masked]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Compiled | Masked] = queue.SimpleQueue()
        self._num_masks_due = 0
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for jobs, count in ((self._compile_jobs, 1), (self._mask_jobs, _NUM_MASK_THREADS)):
            for _ in range(count):
                threading.Thread(target=self._work, args=(jobs,), daemon=True).start()

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return self._wake_fd

    def compile(
        self, client: str, handle: int, request: Request, is_wanted: Callable[[], bool]
    ) -> None:
        """Will be answered by a `Compiled`, unless it is not wanted any more when its turn comes:
        who asks and gives up at once must not hold up the others."""

        def job() -> Compiled | None:
            return _compiled(self._grammars, client, handle, request) if is_wanted() else None

        self._compile_jobs.put(job)

    def advance(self, request: RequestState, token_id: int) -> None:
        """The request goes on by a token. Will be answered by a `Masked`."""
        self._num_masks_due += 1
        self._mask_jobs.put(lambda: _masked(request, token_id))

    def take(self, wait_s: float = 0.0) -> list[Compiled | Masked]:
        """What is done. Waits up to `wait_s` until all masks are."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        deadline = time.monotonic() + wait_s
        taken: list[Compiled | Masked] = []
        with contextlib.suppress(queue.Empty):
            while True:
                left_s = deadline - time.monotonic() if self._num_masks_due else 0.0
                done = self._done.get(timeout=left_s) if left_s > 0 else self._done.get_nowait()
                self._num_masks_due -= isinstance(done, Masked)
                taken.append(done)
        return taken

    def _work(self, jobs: "queue.SimpleQueue[Callable[[], Any]]") -> None:
        while True:
            if (done := jobs.get()()) is not None:
                self._done.put(done)
                os.eventfd_write(self._wake_fd, 1)


def _compiled(grammars: Grammars, client: str, handle: int, request: Request) -> Compiled:
    form = request.sampling.structured_outputs
    assert form is not None
    try:
        matcher, mask = grammars.matcher(request.sampling)
        return Compiled(client, handle, request, Constraint(matcher, mask))
    except BaseException as error:  # a panic in llguidance is no Exception
        field = f"structured_outputs.{field_of(form)}"
        text = f"{field} cannot be served: {_reason(error)}"
        return Compiled(client, handle, request, None, text, field)


def _masked(request: RequestState, token_id: int) -> Masked:
    try:
        assert request.constraint is not None
        matcher: Matcher = request.constraint.matcher
        matcher.accept(token_id)
        return Masked(request, matcher.mask())
    except BaseException as error:  # see above
        return Masked(request, None, f"the form of the output: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, GrammarError) else f"{type(error).__name__}: {error}"
