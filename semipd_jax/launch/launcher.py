"""The life of an engine: start-up in order, replacement of workers, an orderly end.

Start-up: the front end (if there is one) binds its port, the memory owner loads the weights and
says how large everything is, then coordinator and workers start; when all are ready, the front end
may serve. Later a worker that dies is replaced. Any other death ends the engine: its state cannot
be rebuilt, and an orderly end is better than half a service.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from semipd_jax import run_dir
from semipd_jax.config import LANES, EngineConfig, Lane
from semipd_jax.errors import EngineError, StartupError, UnavailableError
from semipd_jax.launch import device, waits
from semipd_jax.launch.device import Chosen
from semipd_jax.launch.process import Events, Exited, Process, failure
from semipd_jax.launch.workers import LEAVE_S, Workers, WorkerSlot
from semipd_jax.messages import (
    Alive,
    ChildSpec,
    Drain,
    Failed,
    FromChild,
    MemoryLayout,
    Progress,
    Ready,
    RetireWorker,
    Serve,
    Stalled,
    StartWorker,
    ToChild,
    WaitingFor,
)
from semipd_jax.shares import backend as shares
from semipd_jax.tuner.setup import check_profile

COORDINATOR_SILENCE_S: Final = 30.0
"""A coordinator that says nothing for this long is hung. It gives a sign of life every second."""

_TICK_S: Final = 1.0
_STOP_S: Final = 12.0  # a little more than a child's own grace period

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """What each process runs (`python -m`)."""

    owner: str = "semipd_jax.owner"
    coordinator: str = "semipd_jax.coordinator"
    worker: str = "semipd_jax.worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """An optional process that serves clients: its module, and what it is told in `extra`."""

    module: str
    extra: dict[str, str] = field(default_factory=dict[str, str])


class Launcher:
    """Runs the processes of one engine. Installs no signal handlers and keeps no global state.

    Args:
      on_failure: called once, from another thread, if the engine ends by itself.
      on_progress: called with (process name, progress) during start-up.

    Attributes:
      run_dir: private directory of the engine's sockets.
      finished: set when no process is left.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        front_end: FrontEnd | None = None,
        modules: Modules | None = None,
        on_failure: Callable[[EngineError], object] = lambda _: None,
        on_progress: Callable[[str, Progress], object] = lambda _name, _progress: None,
    ) -> None:
        self._config = config
        self._front_end_spec = front_end
        self._modules = modules or Modules()
        self._on_failure = on_failure
        self._on_progress = on_progress
        self._events: Events = queue.SimpleQueue()
        self._processes: list[Process] = []
        self._workers = Workers(
            config,
            start=self._start_worker,
            kill=self._kill,
            tell=self._tell_coordinator,
            is_fate_shared=lambda: shares.is_fate_shared(self._device.platform, self._share_terms),
        )
        self._front_end: Process | None = None
        self._owner: Process | None = None
        self._coordinator: Process | None = None
        self._coordinator_ready = False
        self._last_words: dict[Process, Failed] = {}
        self._device = Chosen("cpu")
        self._share_terms: shares.Terms = {}
        self._silent_s = 0.0  # the coordinator
        self._checked_s = time.monotonic()
        self._has_begun = False
        self._thread: threading.Thread | None = None
        self._taken = threading.Lock()  # by whoever is to call `_finish`, for good
        self._layout: MemoryLayout | None = None
        self._started = threading.Event()
        self._stopping = False
        self._draining = False
        self.error: EngineError | None = None
        self.finished = threading.Event()
        self.address: str | None = None
        self.http_address: str | None = None
        self.run_dir = ""
        self._held: int | None = None  # keeps it from being taken for abandoned
        self._progress: dict[str, str] = {}  # of what is not ready, by name
        self._told: tuple[str, ...] = ()

    # ------------------------------------------------------------ for the caller

    def start(self) -> MemoryLayout:
        """Starts everything and returns when all is ready.

        Raises:
          EngineError: of the kind that made the start fail; nothing is left behind.
        """
        self._begin()
        if not waits.until_set(self._started, self._config.timeouts.startup_s):
            waiting = ", ".join(self._not_ready())
            self._end(
                StartupError(
                    f"not ready after {self._config.timeouts.startup_s:.0f} s (startup_s); "
                    f"still waiting for: {waiting}"
                )
            )
            waits.until_set(self.finished)
        if self.error is not None:
            waits.until_set(self.finished)
            raise self.error
        if self._layout is None or self._not_ready():
            raise UnavailableError("the engine was stopped while it started")
        return self._layout

    def drain(self) -> None:
        """Lets the front end finish what runs, within `timeouts.shutdown_s`. Then call `stop`."""
        if self._front_end is not None and not self._stopping:
            self._draining = True
            self._front_end.send(Drain())
            self._front_end.wait(time.monotonic() + self._config.timeouts.shutdown_s + _STOP_S)

    def stop(self) -> None:
        """Ends every process, politely, then by force. Safe to call at any time, and twice.

        Returns when none is left; from `on_progress`, at once: they end when that returns.
        """
        self._stopping = True
        self._events.put(None)
        if self._has_begun and threading.current_thread() is not self._thread:
            waits.until_set(self.finished)

    def kill(self) -> None:
        """Ends every process now."""
        self._stopping = True
        for process in list(self._processes):
            self._kill(process)
        self.stop()

    @property
    def device_name(self) -> str:
        """Of the running engine."""
        return self._device.name or device.cpu_name()

    # ------------------------------------------------------------ supervision

    def _begin(self) -> None:
        """Leaves the rest to a thread. If that fails, nothing is left behind."""
        try:
            self._has_begun = True  # from now on `stop` waits
            self.run_dir, self._held = run_dir.create()
            self._thread = threading.Thread(target=self._supervise, name="launcher", daemon=True)
            self._thread.start()
        except BaseException:  # an interrupt may come when the thread runs, or is about to
            if self._taken.acquire(blocking=False):
                self._finish()
            self.stop()
            raise

    def _supervise(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            with contextlib.ExitStack() as hosting:
                self._run(hosting)
                self._end_processes()
        except Exception:
            _log.exception("the launcher could not end everything")
        finally:  # somebody waits for it
            self._finish()

    def _run(self, hosting: contextlib.ExitStack) -> None:
        """Starts the processes and attends to them until the engine is to end."""
        try:
            if self._stopping:
                return
            self._device = device.choose(self._config.device, self.run_dir)
            self._share_terms = hosting.enter_context(
                shares.host(
                    self._device.platform, self._config.shares, self.run_dir, self._device.num_sms
                )
            )
            if self._front_end_spec is not None:
                spec = self._spec("front end", extra=self._front_end_spec.extra)
                self._front_end = self._spawn(self._front_end_spec.module, spec)
            self._owner = self._spawn(self._modules.owner, self._spec("memory owner"))
            while not self._stopping:
                self._next_event()
        except EngineError as error:
            self._end(error)
        except Exception as error:
            _log.exception("the launcher failed")
            self._end(EngineError(f"the launcher failed: {error}"))

    def _next_event(self) -> None:
        try:
            event = self._events.get(timeout=_TICK_S)
        except queue.Empty:
            event = None
        if event is not None:
            self._handle(*event)
            self._tell_front_end()
        self._check_coordinator(has_heard_all=event is None)
        self._workers.check()

    def _handle(self, process: Process, message: FromChild | Exited) -> None:
        match message:
            case Progress(stage=stage, done=done, total=total):
                self._progress[process.name] = f"{stage} {done}/{total}"
                self._on_progress(process.name, message)
            case Ready():
                self._ready(process, message)
            case Failed():
                self._last_words[process] = message
            case Alive():
                self._silent_s = 0.0
            case Stalled(worker_id=worker_id):
                self._workers.replace_stalled(worker_id)
            case StartWorker(lane=lane, share=share):
                self._workers.add(lane, share)
            case RetireWorker(worker_id=worker_id):
                self._workers.retire(worker_id)
            case Exited(status=status):
                self._exited(process, status)

    def _ready(self, process: Process, message: Ready) -> None:
        if self._stopping:
            return
        if process is self._front_end:
            self.address, self.http_address = message.address, message.http_address
        elif process is self._owner:
            assert message.layout is not None
            check_profile(self._config, self.device_name, message.layout)
            self._layout = message.layout
            spec = self._spec("coordinator")
            self._coordinator = self._spawn(self._modules.coordinator, spec)
            for lane in LANES[self._config.mode]:
                self._workers.start_next(lane)
        elif process is self._coordinator:
            self._coordinator_ready = True
        elif (slot := self._workers.slot_of(process)) is not None:
            self._workers.ready(slot, message.private_bytes)
        if not self._started.is_set() and not self._not_ready():
            assert self._layout is not None
            if self._front_end is not None:
                self._front_end.send(Serve(layout=self._layout))
            self._workers.log_memory()
            self._workers.is_running = True
            self._started.set()

    def _not_ready(self) -> list[str]:
        waits = [
            ("front end", self._front_end_spec is None or self.address is not None),
            ("memory owner", self._layout is not None),
            ("coordinator", self._coordinator_ready),
            *((slot.name, self._workers.is_served(slot)) for slot in self._workers.slots),
        ]
        return [name for name, is_ready in waits if not is_ready]

    def _tell_front_end(self) -> None:
        """Which parts it waits for, whenever that changes."""
        if self._front_end is None or self._stopping:
            return
        parts = tuple(f"{n}: {self._progress.get(n, 'not ready')}" for n in self._not_ready())
        if parts != self._told:
            self._told = parts
            self._front_end.send(WaitingFor(parts=parts))

    def _exited(self, process: Process, status: int) -> None:
        self._processes.remove(process)
        words = self._last_words.pop(process, None)
        if self._stopping or (self._draining and process is self._front_end):
            return
        if process in (self._front_end, self._owner, self._coordinator):
            raise failure(process.name, status, words)
        self._workers.exited(process, status, words)

    def _check_coordinator(self, *, has_heard_all: bool) -> None:
        """Ends the engine if the coordinator hangs. Time in which this process was stopped itself
        does not count."""
        now = time.monotonic()
        self._silent_s += min(now - self._checked_s, 2 * _TICK_S)
        self._checked_s = now
        if self._coordinator is None or not self._coordinator_ready:
            self._silent_s = 0.0
        elif has_heard_all and self._silent_s > COORDINATOR_SILENCE_S:
            self._coordinator.kill()
            raise EngineError(f"the coordinator has been silent for {self._silent_s:.0f} s")

    def _tell_coordinator(self, message: ToChild) -> None:
        assert self._coordinator is not None
        self._coordinator.send(message)

    # ------------------------------------------------------------ beginnings and ends

    def _spec(
        self,
        name: str,
        *,
        lane: Lane | None = None,
        share: float | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> ChildSpec:
        return ChildSpec(
            name=name,
            run_dir=self.run_dir,
            config=self._config,
            platform=self._device.platform,
            layout=self._layout,
            lane=lane,
            share=share,
            extra=dict(extra or {}),
        )

    def _start_worker(self, slot: WorkerSlot) -> Process:
        self._progress.pop(slot.name, None)
        own = {"worker_id": slot.worker_id, "is_extra": str(slot.is_extra)}
        extra = {**own, **self._share_terms}
        spec = self._spec(slot.name, lane=slot.lane, share=slot.share, extra=extra)
        return self._spawn(self._modules.worker, spec)

    def _spawn(self, module: str, spec: ChildSpec) -> Process:
        process = Process(module, spec, self._events)
        self._processes.append(process)
        return process

    def _end(self, error: EngineError) -> None:
        """Makes the engine end with `error`; the first one counts."""
        if self.error is None and not self._stopping:
            self.error = error
        self._stopping = True
        self._events.put(None)

    def _kill(self, process: Process) -> None:
        try:
            shares.evict(self._device.platform, process.pid, self._share_terms)
        finally:
            process.kill()

    def _end_processes(self) -> None:
        """The memory owner goes last: on some devices its memory goes with it."""
        self._stopping = True
        owner = [process for process in self._processes if process is self._owner]
        workers = [p for p in self._processes if p in self._workers.alive]
        others = [p for p in self._processes if p not in owner and p not in workers]
        for process in workers + others:
            process.ask_to_stop()
        asked_s = time.monotonic()
        self._await_end(workers, asked_s + LEAVE_S)
        self._await_end(others, asked_s + _STOP_S)
        for process in owner:
            process.ask_to_stop()
        self._await_end(owner, time.monotonic() + _STOP_S)

    def _await_end(self, processes: Sequence[Process], deadline_s: float) -> None:
        for process in processes:
            if not process.wait(deadline_s):
                _log.warning("%s does not stop and is killed", process.name)
                self._kill(process)
                process.wait(time.monotonic() + _STOP_S)

    def _finish(self) -> None:
        if self._held is not None:
            run_dir.remove(self.run_dir)
            os.close(self._held)
        failed_while_serving = self._started.is_set() and self.error is not None
        self.finished.set()
        self._started.set()  # whoever waits for it finds everything ended
        if failed_while_serving and self.error is not None:
            self._on_failure(self.error)
