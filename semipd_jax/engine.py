"""The engine as a library: the same processes as behind a server, without the front end.

    with Engine("path/to/model", max_num_seqs=16) as engine:
        print(engine.generate("def main():", max_tokens=32).text)

An engine owns its processes and nothing else: no signal handlers, no global state, several engines
in one program. Options are those of `python -m semipd_jax.serve`, by the same names.
"""

import asyncio
import math
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Final

from semipd_jax.client import EngineClient, Prompt
from semipd_jax.errors import EngineError, RequestFailedError, UnavailableError
from semipd_jax.launch.launcher import Launcher
from semipd_jax.messages import MemoryLayout, Partition, Stats
from semipd_jax.options import build_config
from semipd_jax.request import Delta, Event, Finished, FinishReason, TokenLogprob, Usage

_CALL_TIMEOUT_S: Final = 60.0
_WAKE_S: Final = 0.5
_STOPPED: Final = "the engine is stopped"


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything that a request brought."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason
    matched_stop: str | int | None
    usage: Usage


class AsyncEngine:
    """An engine on the caller's event loop.

    Args:
      model: model directory, in Hugging Face or Orbax format.
      options: see `semipd_jax.options.OPTIONS`.

    Raises:
      ConfigError: an option is unknown or its value is not allowed.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._config = build_config(model, **options)
        self._launcher: Launcher | None = None
        self._client: EngineClient | None = None
        self._layout: MemoryLayout | None = None

    @property
    def layout(self) -> MemoryLayout:
        """Sizes of the running engine."""
        if self._layout is None:
            raise UnavailableError("the engine is not running")
        return self._layout

    async def start(self) -> None:
        """Returns when every process is ready; raises the EngineError that prevented it."""
        if self._launcher is not None:
            raise EngineError("the engine was started already")
        loop = asyncio.get_running_loop()
        launcher = Launcher(
            self._config,
            on_failure=lambda error: loop.call_soon_threadsafe(self._lost, error),
        )
        self._launcher = launcher
        try:
            self._layout = await asyncio.to_thread(launcher.start)
            self._client = await EngineClient.connect(
                launcher.run_dir, self._layout, self._config.model
            )
        except BaseException as error:
            await asyncio.to_thread(launcher.stop)
            self._launcher = None
            if isinstance(error, OSError) and launcher.error is not None:
                raise launcher.error from error  # it ended while the client connected
            raise

    async def stop(self) -> None:
        """Ends what runs and every process. Safe to call twice."""
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._launcher is not None:
            await asyncio.to_thread(self._launcher.stop)
            self._launcher = None
        self._layout = None

    def kill(self) -> None:
        """Ends what runs and every process, from any thread: for when there is no waiting for the
        event loop. Returns when none is left."""
        if self._launcher is not None:
            self._launcher.stop()

    async def __aenter__(self) -> "AsyncEngine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **sampling: Any,
    ) -> AsyncGenerator[Event]:
        """Streams Started, Deltas, Finished. Closing the generator ends the request.

        Args:
          prompt: text, token ids, or chat messages ({"role": …, "content": …}).
          priority, cache_salt: see `request.Request`.
          sampling: fields of `request.SamplingParams`; absent ones are the model's defaults.

        Raises (while iterating):
          InvalidRequestError, DuplicateRequestError, OverloadedError, UnavailableError,
          RequestFailedError.
        """
        return self._running().generate(
            prompt, sampling, request_id=request_id, priority=priority, cache_salt=cache_salt
        )

    async def complete(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generates to the end."""
        async with aclosing(self.generate(prompt, **sampling)) as events:
            return collect([event async for event in events])

    async def complete_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generates for all prompts at the same time; results are in the order of the prompts. If
        one fails, the others end and its error is raised."""
        limits = self._config.scheduler
        room = asyncio.Semaphore(limits.max_num_seqs + limits.max_num_queued_reqs // 2)

        async def one(prompt: Prompt) -> Generation:
            async with room:
                return await self.complete(prompt, **sampling)

        tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            await _cancel(tasks)
            raise
        finally:
            tasks.clear()  # an error's traceback leads here, and they to the error

    async def abort(self, request_id: str) -> None:
        """Ends a request; raises RequestNotFoundError if it is not running."""
        await self._running().abort(request_id)

    async def stats(self) -> Stats:
        return await self._running().stats()

    async def partition(self) -> Partition:
        """How compute is divided, by whom, and for what."""
        return await self._running().partition()

    async def set_partition(self, **change: Any) -> Partition:
        """See `EngineClient.set_partition`."""
        return await self._running().set_partition(**change)

    async def set_slo(self, **slo: Any) -> Partition:
        """See `EngineClient.set_slo`."""
        return await self._running().set_slo(**slo)

    async def watch(self, *, interval_s: float = 1.0) -> AsyncGenerator[Stats]:
        """Statistics, with the partition, now and then every `interval_s`."""
        while True:
            yield await self.stats()
            await asyncio.sleep(interval_s)

    def _running(self) -> EngineClient:
        if self._client is None:
            raise UnavailableError("the engine is not running")
        return self._client

    def _lost(self, error: EngineError) -> None:
        if self._client is not None:
            self._client.connection_lost(error)


class Engine:
    """An engine for programs without an event loop; it keeps one in a thread of its own.

    Starts at once. Use it in a `with` statement, or call `stop`; one that is forgotten stops when
    it is collected or the program ends.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._engine = AsyncEngine(model, **options)
        self._loop = asyncio.new_event_loop()
        run = self._loop.run_forever
        self._thread = threading.Thread(target=run, name="semipd engine", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _end, self._engine, self._loop, self._thread)
        try:
            self._run(self._engine.start, timeout_s=None)
        except BaseException:
            self._finalizer()
            raise

    @property
    def layout(self) -> MemoryLayout:
        """Sizes of the running engine."""
        return self._engine.layout

    def generate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generates to the end. See `AsyncEngine.generate`."""
        return self._run(lambda: self._engine.complete(prompt, **sampling), timeout_s=None)

    def generate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """See `AsyncEngine.complete_many`."""
        return self._run(lambda: self._engine.complete_many(prompts, **sampling), timeout_s=None)

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[Event]:
        """Yields events as they come. Closing the iterator ends the request."""
        events = self._engine.generate(prompt, **sampling)
        try:
            while (event := self._run(lambda: anext(events, None), timeout_s=None)) is not None:
                yield event
        finally:
            if self._finalizer.alive:  # no waiting: any thread may collect what was not closed
                self._tell(_Call(events.aclose).begin)

    def stats(self) -> Stats:
        return self._run(self._engine.stats, timeout_s=_CALL_TIMEOUT_S)

    def partition(self) -> Partition:
        """How compute is divided, by whom, and for what."""
        return self._run(self._engine.partition, timeout_s=_CALL_TIMEOUT_S)

    def set_partition(self, **change: Any) -> Partition:
        """See `EngineClient.set_partition`."""
        return self._run(lambda: self._engine.set_partition(**change), timeout_s=_CALL_TIMEOUT_S)

    def set_slo(self, **slo: Any) -> Partition:
        """See `EngineClient.set_slo`."""
        return self._run(lambda: self._engine.set_slo(**slo), timeout_s=_CALL_TIMEOUT_S)

    def watch(self, *, interval_s: float = 1.0) -> Iterator[Stats]:
        """Statistics, with the partition, now and then every `interval_s`."""
        while True:
            yield self.stats()
            time.sleep(interval_s)

    def stop(self) -> None:
        """Ends what runs and every process. Safe to call twice."""
        if self._finalizer.alive:
            with suppress(EngineError):  # another thread stops it, or this one cannot wait for it
                self._run(self._engine.stop, timeout_s=None)
            self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, work: Callable[[], Awaitable[Any]], *, timeout_s: float | None) -> Any:
        """The result. A caller that is interrupted, or waits in vain, ends what it asked for."""
        if not self._finalizer.alive:
            raise UnavailableError(_STOPPED)
        if threading.current_thread() is self._thread:
            raise EngineError("the engine was called on its own thread, which cannot wait for it")
        call = _Call(work)
        try:
            self._tell(call.begin)
            call.wait(self._loop, timeout_s)
        except BaseException:
            self._tell(call.leave)
            raise
        if call.errors:
            raise call.errors.pop()  # its traceback leads to the call
        return call.result

    def _tell(self, what: Callable[[], None]) -> None:
        """Has the loop call it, or nobody if the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)


class _Call:
    """What a thread asks of the event loop, on which `begin` and `leave` are called.

    The loop waits for no lock that the thread takes: an interrupt could leave it taken for ever.

    Attributes:
      result, errors: of a call that has ended; one error at most.
    """

    def __init__(self, work: Callable[[], Awaitable[Any]]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._latch = threading.Lock()  # until it has ended
        self._latch.acquire()
        self.result: Any = None
        self.errors: list[BaseException] = []

    def begin(self) -> None:
        self._task = asyncio.create_task(_awaited(self._work))
        self._task.add_done_callback(self._ended)

    def leave(self) -> None:
        """The caller has gone, perhaps before it knew that the call had begun."""
        if self._task is not None:
            self._task.cancel()

    def wait(self, loop: asyncio.AbstractEventLoop, timeout_s: float | None) -> None:
        """Until it has ended. Python cannot wake a thread for a signal that comes just before it
        begins to wait, so that it wakes by itself now and then.

        Raises:
          TimeoutError.
          UnavailableError: the loop is closed.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._latch.acquire(timeout=_WAKE_S):
            if loop.is_closed():
                raise UnavailableError(_STOPPED)
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no answer within {timeout_s:g} s")

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._task = None
        if task.cancelled():
            self.errors.append(UnavailableError(_STOPPED))  # whoever waits did not cancel it
        elif (error := task.exception()) is not None:
            self.errors.append(error)
        else:
            self.result = task.result()
        self._latch.release()


async def _awaited(work: Callable[[], Awaitable[Any]]) -> Any:
    return await work()


def _end(engine: AsyncEngine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Leaves no process and no thread. At the end of the program no new thread can be had, so the
    launcher is stopped from this one. The loop's own, which collects garbage as others do, cannot
    wait for itself: another one does."""
    if threading.current_thread() is thread:
        threading.Thread(target=_end, args=(engine, loop, thread), daemon=False).start()
        return
    engine.kill()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(_CALL_TIMEOUT_S)
    loop.run_until_complete(_cancel_all())
    loop.close()


async def _cancel_all() -> None:
    """Tasks that a forgotten engine left, and those that begin meanwhile."""
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await _cancel(tasks)


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Returns when all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def collect(events: Sequence[Event]) -> Generation:
    """All events of one request as one result."""
    deltas = [event for event in events if isinstance(event, Delta)]
    last = events[-1] if events else None
    if not isinstance(last, Finished):
        raise RequestFailedError("the stream ended without a Finished event")
    return Generation(
        token_ids=tuple(t for delta in deltas for t in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(p for delta in deltas for p in delta.logprobs),
        reason=last.reason,
        matched_stop=last.matched_stop,
        usage=last.usage,
    )
