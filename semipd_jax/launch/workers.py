"""Which workers an engine has: one slot for each, whatever process is behind it at the moment.

A worker that dies is replaced; one beside the ladder comes and goes as the coordinator wants. Only
the launcher's thread comes here: it says what happened, and starts and ends processes when told to.
"""

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from semipd_jax.config import LANES, EngineConfig, Lane
from semipd_jax.errors import EngineError
from semipd_jax.launch.process import Process, failure
from semipd_jax.messages import Failed, ShareUnavailable, WorkerLost

MAX_FAILED_STARTS: Final = 5
"""Replacements of one worker that may fail in a row before they are ready. One that was killed from
outside does not count: that says nothing about the worker."""

LEAVE_S: Final = 8.0
"""A worker that was asked to stop finishes its steps in this time or is taken off the device. Less
than a child's own grace period: one that ends with work on a GPU could harm others there."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class WorkerSlot:
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


class Workers:
    """The slots, and what becomes of their processes.

    Args:
      start: starts the process of a slot.
      kill: takes a process off the device and ends it now.
      tell: the coordinator.
      is_fate_shared: whether a fault of one worker is a fault of all.

    Attributes:
      is_running: every worker was ready once. From then on those that die are replaced.
      alive: processes that have not ended, as far as was heard; those that are to leave too.
      start_limit_s: how long a start may take.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        start: Callable[[WorkerSlot], Process],
        kill: Callable[[Process], None],
        tell: Callable[[WorkerLost | ShareUnavailable], None],
        is_fate_shared: Callable[[], bool],
    ) -> None:
        self.slots = [
            WorkerSlot(lane, share)
            for lane in LANES[config.mode]
            for share in config.shares.rungs(lane)
        ]
        self.is_running = False
        self.alive: set[Process] = set()
        self.start_limit_s = config.timeouts.startup_s
        self._start_process = start
        self._kill = kill
        self._tell = tell
        self._is_fate_shared = is_fate_shared
        self._numbers = itertools.count(1)
        self._retired: set[Process] = set()
        self._leaving: dict[Process, float] = {}  # asked to stop → until when they may stay
        self._in_the_way: set[Process] = set()  # to be gone before other workers start
        self._due: list[WorkerSlot] = []  # to be started then
        self._asked: dict[Lane, float] = {}  # beside the ladder, and not started yet

    def slot_of(self, process: Process) -> WorkerSlot | None:
        return next((slot for slot in self.slots if slot.process is process), None)

    def is_served(self, slot: WorkerSlot) -> bool:
        """Whether the worker is ready or, once the engine runs, another one of its lane is."""
        others = self.slots if self.is_running else ()
        return slot.is_ready or any(s.is_ready for s in others if s.lane == slot.lane)

    def log_memory(self) -> None:
        """What warm workers cost, idle ones included."""
        held = {slot.name: slot.private_bytes for slot in self.slots if slot.private_bytes}
        each = ", ".join(f"{name} {num_bytes >> 20} MiB" for name, num_bytes in held.items())
        total = sum(held.values()) >> 20
        _log.info("%d workers hold %d MiB of host memory: %s", len(held), total, each)

    # ------------------------------------------------------------ what is wanted

    def start_next(self, lane: Lane) -> None:
        """Starts the lane's next worker that was never started: one after another, so that what
        one compiles is there for the next."""
        never_started = [s for s in self.slots if s.lane == lane and s.process is None]
        if waiting := [slot for slot in never_started if slot not in self._due]:
            self._start(waiting[-1])

    def add(self, lane: Lane, share: float) -> None:
        """A worker beside the ladder, unless there is one. While another one of the lane starts, it
        waits, and only the last one that was asked for meanwhile is started at all."""
        self._asked[lane] = share
        self._start_due()

    def retire(self, worker_id: str) -> None:
        for slot in self.slots:
            if slot.worker_id == worker_id and slot.process is not None:
                self.slots.remove(slot)
                if slot in self._due:
                    self._due.remove(slot)
                else:
                    self._retired.add(slot.process)
                    self._ask_to_leave(slot.process)
                return

    def replace_stalled(self, worker_id: str) -> None:
        for slot in self.slots:
            if slot.worker_id == worker_id and slot.process is not None:
                _log.warning("%s holds a step for too long and is replaced", worker_id)
                self._kill(slot.process)

    # ------------------------------------------------------------ what happens

    def ready(self, slot: WorkerSlot, private_bytes: int | None) -> None:
        slot.is_ready = True
        slot.started_s = None
        slot.private_bytes = private_bytes
        slot.down_since_s = None
        slot.num_failed_starts = 0
        self.start_next(slot.lane)
        self._start_due()

    def exited(self, process: Process, status: int, words: Failed | None) -> None:
        """Has the worker replaced, unless it was to go. Raises EngineError if it cannot be."""
        self.alive.discard(process)
        self._in_the_way.discard(process)
        is_asked = self._leaving.pop(process, None) is not None
        slot = self.slot_of(process)
        if process in self._retired:
            self._retired.remove(process)
        elif slot is None or not self.is_running:
            raise failure(process.name, status, words)
        else:
            self._replace(slot, status, words, is_asked=is_asked)
        self._start_due()

    def check(self) -> None:
        """Sees to what takes too long. Raises EngineError if the engine cannot go on."""
        self._check_outages()
        self._check_starts()
        self._check_leaving()

    # ------------------------------------------------------------ replacements

    def _start(self, slot: WorkerSlot) -> None:
        slot.worker_id = f"{slot.lane}-{slot.share:.2f}-{next(self._numbers)}"
        slot.started_s = time.monotonic()
        slot.process = self._start_process(slot)
        self.alive.add(slot.process)

    def _start_due(self) -> None:
        for lane, share in list(self._asked.items()):
            slots = [slot for slot in self.slots if slot.lane == lane]
            if all(slot.is_ready for slot in slots if slot.is_extra):
                del self._asked[lane]
                if all(slot.share != share for slot in slots):
                    self.slots.append(WorkerSlot(lane, share, is_extra=True))
                    self._due.append(self.slots[-1])
        while self._due and not self._in_the_way:
            self._start(self._due.pop(0))

    def _replace(
        self, slot: WorkerSlot, status: int, words: Failed | None, *, is_asked: bool
    ) -> None:
        _log.warning("%s", failure(slot.name, status, words))
        self._tell(WorkerLost(worker_id=slot.worker_id, lane=slot.lane, is_to_blame=not is_asked))
        was_ready, slot.is_ready, slot.started_s = slot.is_ready, False, None
        if was_ready:
            slot.down_since_s = time.monotonic()
            if not is_asked and status != -signal.SIGKILL:
                self._clear_device(slot)
        elif status >= 0 and not is_asked:
            slot.num_failed_starts += 1
        if slot.num_failed_starts and slot.is_extra:
            self.slots.remove(slot)
            self._tell(ShareUnavailable(lane=slot.lane, share=slot.share))
        elif slot.num_failed_starts >= MAX_FAILED_STARTS:
            name = f"the {MAX_FAILED_STARTS}th replacement in a row of the {slot.lane} worker"
            raise failure(name, status, words)
        else:
            self._due.append(slot)

    def _clear_device(self, failed: WorkerSlot) -> None:
        """Where a fault of one worker is a fault of all, all leave before new ones can work."""
        if self._is_fate_shared():
            for slot in self.slots:
                if slot is not failed and slot.process in self.alive:
                    _log.warning("%s shares the fate of %s", slot.name, failed.name)
                    self._ask_to_leave(slot.process)
            self._in_the_way.update(self._leaving)  # and those that were leaving anyway

    def _ask_to_leave(self, process: Process) -> None:
        self._leaving.setdefault(process, time.monotonic() + LEAVE_S)
        process.ask_to_stop()

    # ------------------------------------------------------------ what takes too long

    def _check_outages(self) -> None:
        """Ends the engine if a lane has been without a worker for longer than a start may take."""
        for slot in self.slots:
            since_s = slot.down_since_s
            is_over = since_s is not None and time.monotonic() - since_s > self.start_limit_s
            if is_over and not self.is_served(slot):
                limit = f"{self.start_limit_s:.0f} s (startup_s)"
                raise EngineError(f"no {slot.lane} worker became ready in {limit}")

    def _check_starts(self) -> None:
        """Kills replacements and extra workers that take longer to start than the engine may, which
        the launcher sees to itself."""
        now_s = time.monotonic()
        for slot in self.slots if self.is_running else ():
            if slot.started_s is not None and now_s - slot.started_s > self.start_limit_s:
                limit_s = self.start_limit_s
                _log.warning("%s is not ready after %.0f s (startup_s)", slot.name, limit_s)
                slot.started_s = None
                slot.num_failed_starts += slot.is_extra
                assert slot.process is not None
                self._kill(slot.process)

    def _check_leaving(self) -> None:
        """Takes workers off the device that were asked to leave and do not."""
        for process, deadline_s in self._leaving.items():
            if time.monotonic() > deadline_s:
                _log.warning("%s does not leave and is killed", process.name)
                self._kill(process)
                self._leaving[process] = math.inf
