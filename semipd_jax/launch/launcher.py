"""The life of an engine: start-up in order, replacement of workers, an orderly end.

Start-up: the front end (if there is one) binds its port, the memory owner loads the weights and
says how large everything is, then coordinator and workers start; when all are ready, the front end
may serve. Later a worker that dies is replaced. Any other death ends the engine: its state cannot
be rebuilt, and an orderly end is better than half a service.
"""

import contextlib
import itertools
import logging
import math
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from semipd_jax import errors
from semipd_jax.config import LANES, EngineConfig, Lane
from semipd_jax.errors import EngineError, StartupError, UnavailableError
from semipd_jax.launch import device
from semipd_jax.launch.device import Chosen
from semipd_jax.launch.process import Events, Exited, Process
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
    ShareUnavailable,
    Stalled,
    StartWorker,
    WaitingFor,
    WorkerLost,
)
from semipd_jax.shares import backend as shares
from semipd_jax.tuner.setup import check_profile

MAX_FAILED_STARTS: Final = 5
"""Replacements of one worker that may fail in a row before they are ready. One that was killed from
outside does not count: that says nothing about the worker."""

COORDINATOR_SILENCE_S: Final = 30.0
"""A coordinator that says nothing for this long is hung. It gives a sign of life every second."""

LEAVE_S: Final = 8.0
"""A worker that was asked to stop finishes its steps in this time or is taken off the device. Less
than a child's own grace period: one that ends with work on a GPU could harm others there."""

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


@dataclass(slots=True)
class _WorkerSlot:
    """One worker as the engine sees it; the process behind it may be replaced.

    Attributes:
      is_extra: it was asked for while the engine runs, and may be given up.
      private_bytes: of the host's memory, what it held for itself when it was ready.
      started_s: when the process was started; None if it is not expected to become ready.
      down_since_s: when a worker that was ready died; None while one is ready, and at the start.
      num_failed_starts: replacements in a row that ended themselves before they were ready. An
        extra worker that is not ready in time counts too.
    """

    lane: Lane
    share: float
    is_extra: bool = False
    process: Process | None = None
    worker_id: str = ""
    is_ready: bool = False
    private_bytes: int | None = None
    started_s: float | None = None
    down_since_s: float | None = None
    num_failed_starts: int = 0

    @property
    def name(self) -> str:
        return f"{self.lane} worker {self.share:.2f}"


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
        self._slots = [
            _WorkerSlot(lane, share)
            for lane in LANES[config.mode]
            for share in config.shares.rungs(lane)
        ]
        self._front_end: Process | None = None
        self._owner: Process | None = None
        self._coordinator: Process | None = None
        self._coordinator_ready = False
        self._last_words: dict[Process, Failed] = {}
        self._device = Chosen("cpu")
        self._share_terms: shares.Terms = {}
        self._retired: list[Process] = []
        self._leaving: dict[Process, float] = {}  # workers asked to stop → until when they may stay
        self._in_the_way: set[Process] = set()  # to be gone before other workers start
        self._due: list[_WorkerSlot] = []  # to be started then
        self._silent_s = 0.0  # the coordinator
        self._checked_s = time.monotonic()
        self._thread: threading.Thread | None = None
        self._worker_numbers = itertools.count(1)
        self._layout: MemoryLayout | None = None
        self._started = threading.Event()
        self._stopping = False
        self._draining = False
        self.error: EngineError | None = None
        self.finished = threading.Event()
        self.address: str | None = None
        self.http_address: str | None = None
        self.run_dir = ""
        self._progress: dict[str, str] = {}  # of what is not ready, by name
        self._told: tuple[str, ...] = ()

    # ------------------------------------------------------------ for the caller

    def start(self) -> MemoryLayout:
        """Starts everything and returns when all is ready.

        Raises:
          EngineError: of the kind that made the start fail; nothing is left behind.
        """
        self.run_dir = tempfile.mkdtemp(prefix="semipd-")
        self._thread = threading.Thread(target=self._supervise, name="launcher", daemon=True)
        self._thread.start()
        if not self._started.wait(self._config.timeouts.startup_s):
            waiting = ", ".join(self._not_ready())
            self._end(
                StartupError(
                    f"not ready after {self._config.timeouts.startup_s:.0f} s (startup_s); "
                    f"still waiting for: {waiting}"
                )
            )
            self.finished.wait()
        if self.error is not None:
            self.finished.wait()
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
        if self.run_dir and threading.current_thread() is not self._thread:
            self.finished.wait()

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

    def _supervise(self) -> None:
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
        self._check_outages()
        self._check_starts()
        self._check_leaving()

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
                self._replace_stalled(worker_id)
            case StartWorker(lane=lane, share=share):
                self._add_worker(lane, share)
            case RetireWorker(worker_id=worker_id):
                self._retire_worker(worker_id)
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
                self._start_next(lane)
        elif process is self._coordinator:
            self._coordinator_ready = True
        elif (slot := self._slot_of(process)) is not None:
            slot.is_ready = True
            slot.started_s = None
            slot.private_bytes = message.private_bytes
            slot.down_since_s = None
            slot.num_failed_starts = 0
            self._start_next(slot.lane)
        if not self._started.is_set() and not self._not_ready():
            assert self._layout is not None
            if self._front_end is not None:
                self._front_end.send(Serve(layout=self._layout))
            self._log_memory()
            self._started.set()

    def _log_memory(self) -> None:
        """What warm workers cost, idle ones included."""
        held = {slot.name: slot.private_bytes for slot in self._slots if slot.private_bytes}
        each = ", ".join(f"{name} {num_bytes >> 20} MiB" for name, num_bytes in held.items())
        total = sum(held.values()) >> 20
        _log.info("%d workers hold %d MiB of host memory: %s", len(held), total, each)

    def _not_ready(self) -> list[str]:
        waits = [
            ("front end", self._front_end_spec is None or self.address is not None),
            ("memory owner", self._layout is not None),
            ("coordinator", self._coordinator_ready),
            *((slot.name, self._is_served(slot)) for slot in self._slots),
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
        self._in_the_way.discard(process)
        is_asked = self._leaving.pop(process, None) is not None
        words = self._last_words.pop(process, None)
        if self._stopping or (self._draining and process is self._front_end):
            return
        slot = self._slot_of(process)
        if process in self._retired:
            self._retired.remove(process)
        elif slot is None or not self._started.is_set():
            self._end(_failure(process.name, status, words))
        else:
            self._replace(slot, status, words, is_asked=is_asked)
        self._start_due()

    # ------------------------------------------------------------ workers

    def _start_worker(self, slot: _WorkerSlot) -> None:
        self._progress.pop(slot.name, None)
        slot.worker_id = f"{slot.lane}-{slot.share:.2f}-{next(self._worker_numbers)}"
        slot.started_s = time.monotonic()
        spec = self._spec(
            slot.name,
            lane=slot.lane,
            share=slot.share,
            extra={
                "worker_id": slot.worker_id,
                "is_extra": str(slot.is_extra),
                **self._share_terms,
            },
        )
        slot.process = self._spawn(self._modules.worker, spec)

    def _replace(
        self, slot: _WorkerSlot, status: int, words: Failed | None, *, is_asked: bool
    ) -> None:
        _log.warning("%s", _failure(slot.name, status, words))
        assert self._coordinator is not None
        self._coordinator.send(WorkerLost(worker_id=slot.worker_id, lane=slot.lane))
        was_ready, slot.is_ready, slot.started_s = slot.is_ready, False, None
        if was_ready:
            slot.down_since_s = time.monotonic()
            if not is_asked and status != -signal.SIGKILL:
                self._clear_device(slot)
        elif status >= 0 and not is_asked:
            slot.num_failed_starts += 1
        if slot.num_failed_starts and slot.is_extra:
            self._slots.remove(slot)
            self._coordinator.send(ShareUnavailable(lane=slot.lane, share=slot.share))
        elif slot.num_failed_starts >= MAX_FAILED_STARTS:
            name = f"the {MAX_FAILED_STARTS}th replacement in a row of the {slot.lane} worker"
            self._end(_failure(name, status, words))
        else:
            self._due.append(slot)

    def _start_due(self) -> None:
        while self._due and not self._in_the_way and not self._stopping:
            self._start_worker(self._due.pop(0))

    def _clear_device(self, failed: _WorkerSlot) -> None:
        """Where a fault of one worker is a fault of all, all leave before new ones can work."""
        if shares.is_fate_shared(self._device.platform, self._share_terms):
            for slot in self._slots:
                if slot is not failed and slot.process in self._processes:
                    _log.warning("%s shares the fate of %s", slot.name, failed.name)
                    self._ask_to_leave(slot.process)
            self._in_the_way.update(self._leaving)  # and those that were leaving anyway

    def _ask_to_leave(self, process: Process) -> None:
        self._leaving.setdefault(process, time.monotonic() + LEAVE_S)
        process.ask_to_stop()

    def _check_leaving(self) -> None:
        """Takes workers off the device that were asked to leave and do not."""
        for process, deadline_s in self._leaving.items():
            if time.monotonic() > deadline_s:
                _log.warning("%s does not leave and is killed", process.name)
                self._kill(process)
                self._leaving[process] = math.inf

    def _check_coordinator(self, *, has_heard_all: bool) -> None:
        """Ends the engine if the coordinator hangs. Time in which this process was stopped itself
        does not count."""
        now = time.monotonic()
        self._silent_s += min(now - self._checked_s, 2 * _TICK_S)
        self._checked_s = now
        if self._coordinator is None or not self._coordinator_ready:
            self._silent_s = 0.0
        elif has_heard_all and self._silent_s > COORDINATOR_SILENCE_S:
            self._end(EngineError(f"the coordinator has been silent for {self._silent_s:.0f} s"))
            self._coordinator.kill()

    def _check_outages(self) -> None:
        """Ends the engine if a lane has been without a worker for longer than a start may take."""
        limit_s = self._config.timeouts.startup_s
        for slot in self._slots:
            since = slot.down_since_s
            if (
                since is not None
                and time.monotonic() - since > limit_s
                and not self._is_served(slot)
            ):
                self._end(
                    EngineError(
                        f"no {slot.lane} worker became ready in {limit_s:.0f} s (startup_s)"
                    )
                )

    def _check_starts(self) -> None:
        """Kills replacements and extra workers that take longer to start than the engine may, which
        `start` sees to itself."""
        limit_s, now_s = self._config.timeouts.startup_s, time.monotonic()
        for slot in self._slots if self._started.is_set() else ():
            if slot.started_s is not None and now_s - slot.started_s > limit_s:
                _log.warning("%s is not ready after %.0f s (startup_s)", slot.name, limit_s)
                slot.started_s = None
                slot.num_failed_starts += slot.is_extra
                assert slot.process is not None
                self._kill(slot.process)

    def _replace_stalled(self, worker_id: str) -> None:
        for slot in self._slots:
            if slot.worker_id == worker_id and slot.process is not None:
                _log.warning("%s holds a step for too long and is replaced", worker_id)
                self._kill(slot.process)

    def _is_served(self, slot: _WorkerSlot) -> bool:
        """Whether the worker is ready or, once the engine runs, another one of its lane is."""
        others = self._slots if self._started.is_set() else ()
        return slot.is_ready or any(s.is_ready for s in others if s.lane == slot.lane)

    def _start_next(self, lane: Lane) -> None:
        """Starts the lane's next worker that was never started: one after another, so that what
        one compiles is there for the next."""
        waiting = [slot for slot in self._slots if slot.lane == lane and slot.process is None]
        if waiting:
            self._start_worker(waiting[-1])

    def _add_worker(self, lane: Lane, share: float) -> None:
        if not any((slot.lane, slot.share) == (lane, share) for slot in self._slots):
            slot = _WorkerSlot(lane, share, is_extra=True)
            self._slots.append(slot)
            self._due.append(slot)
            self._start_due()

    def _retire_worker(self, worker_id: str) -> None:
        for slot in self._slots:
            if slot.worker_id == worker_id and slot.process is not None:
                self._slots.remove(slot)
                if slot in self._due:
                    self._due.remove(slot)
                else:
                    self._retired.append(slot.process)
                    self._ask_to_leave(slot.process)
                return

    def _slot_of(self, process: Process) -> _WorkerSlot | None:
        return next((slot for slot in self._slots if slot.process is process), None)

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
        workers = [p for p in self._processes if p in self._retired or self._slot_of(p)]
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
        with contextlib.suppress(OSError):
            shutil.rmtree(Path(self.run_dir))
        failed_while_serving = self._started.is_set() and self.error is not None
        self._started.set()
        self.finished.set()
        if failed_while_serving and self.error is not None:
            self._on_failure(self.error)


def _failure(name: str, status: int, words: Failed | None) -> EngineError:
    """What to tell about a process that ended by itself."""
    if words is not None:
        kind = getattr(errors, words.kind, EngineError)
        return kind(f"{name}: {words.message}")
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    return EngineError(f"{name} {how}")
