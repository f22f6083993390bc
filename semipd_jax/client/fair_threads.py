"""Threads that callers share evenly: who has one job does not wait for all those of another."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from semipd_jax.client.line import CALLER, Line
from semipd_jax.errors import UnavailableError

_CLOSED: Final = "the engine client was closed"


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
    """`begun` becomes the future that runs in a thread."""

    work: Callable[[], Any]
    begun: asyncio.Future[asyncio.Future[Any]]


class FairThreads:
    """Belongs to the event loop that uses it. No more jobs are begun than there are threads: the
    others wait in a line by caller, which those who are cancelled leave."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_free = num_threads
        self._is_closed = False
        self._line = Line[_Job]()

    async def run[T](self, work: Callable[[], T]) -> T:
        """The result of `work` in a thread, for the task's `CALLER`.

        Raises:
          UnavailableError: the threads were closed before it began.
        """
        if self._is_closed:
            raise UnavailableError(_CLOSED)
        job, caller = _Job(work, asyncio.get_running_loop().create_future()), CALLER.get()
        self._line.push(job, caller)
        try:
            self._begin_next()
            return await asyncio.shield(await job.begun)  # a thread is free when its work is done
        finally:
            self._line.discard(job, caller)

    def close(self) -> None:
        """What has begun may end."""
        self._is_closed = True
        while self._line:
            begun = self._line.pop().begun
            if not begun.done():
                begun.set_exception(UnavailableError(_CLOSED))
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin_next(self) -> None:
        while self._num_free and self._line:
            job = self._line.pop()
            if job.begun.done():  # cancelled this moment
                continue
            running = asyncio.get_running_loop().run_in_executor(self._threads, job.work)
            self._num_free -= 1
            running.add_done_callback(self._end)
            job.begun.set_result(running)

    def _end(self, running: asyncio.Future[Any]) -> None:
        if not running.cancelled():
            running.exception()  # whoever asked may have left
        self._num_free += 1
        self._begin_next()
