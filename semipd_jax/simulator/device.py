"""A device on a virtual clock: up to one step of each lane runs at a time, the next ones wait.

A lane is what runs one step after another: a phase's workers, or a link. While two lanes run, each
advances at the speed that the machine gives it beside the other.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from semipd_jax.simulator.machine import Load, Machine

_BATCH: Final = 4096


@dataclass(slots=True, eq=False)
class Job:
    """A step at a worker.

    Attributes:
      worker_id: who runs it.
      num_rows: tokens in the reply.
      ready_s: it does not start before.
      left: part of it that is still to run, 1 to 0.
      started_s, overlap_s: when it began, and for how long the other lane ran meanwhile.
      full_s: the time that all of it would take at the present speed.
    """

    worker_id: str
    step_id: int
    num_rows: int
    load: Load
    share: float
    ready_s: float
    noise: float = 1.0
    left: float = 1.0
    started_s: float = 0.0
    overlap_s: float = 0.0
    full_s: float = 0.0


@dataclass(slots=True)
class _Lane:
    running: Job | None = None
    waiting: deque[Job] = field(default_factory=deque[Job])


class Device:
    """
    Args:
      noise: standard deviation of the logarithm of a step's time.
      hop_s: from sending a step until it may start.
      host_s: of each token that a step returns, what other processes take of one core of the
        device, if that is the CPU. A lane waits for it if it was on that core: for a part of it
        that is the lane's share, on average, since its threads wait for each other.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        num_lanes: int,
        hop_s: float,
        noise: float,
        seed: int,
        host_s: float = 0.0,
    ) -> None:
        self._machine = machine
        self._lanes = [_Lane() for _ in range(num_lanes)]
        self._hop_s = hop_s
        self._host_s = host_s
        self._noise = noise
        self._rng = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._now_s = 0.0
        self.busy_s = [0.0] * num_lanes

    def send(
        self,
        lane: int,
        worker_id: str,
        step_id: int,
        num_rows: int,
        load: Load,
        share: float,
    ) -> None:
        """Queues a step at the device's time."""
        job = Job(
            worker_id, step_id, num_rows, load, share, self._now_s + self._hop_s, self._factor()
        )
        self._lanes[lane].waiting.append(job)
        self._start()

    @property
    def next_s(self) -> float:
        """When something happens next; infinity if nothing is going on."""
        times = [math.inf]
        for lane in self._lanes:
            if lane.running is not None:
                times.append(self._now_s + lane.running.left * lane.running.full_s)
            elif lane.waiting:
                times.append(lane.waiting[0].ready_s)
        return min(times)

    def advance(self, now_s: float) -> list[tuple[int, Job]]:
        """Runs until `now_s`, which is at most `next_s`; returns (lane, job) of what is done."""
        elapsed, self._now_s = now_s - self._now_s, now_s
        both = sum(lane.running is not None for lane in self._lanes) > 1
        done: list[tuple[int, Job]] = []
        for i, lane in enumerate(self._lanes):
            job = lane.running
            if job is None:
                continue
            self.busy_s[i] += elapsed
            job.left -= elapsed / job.full_s
            if both:
                job.overlap_s += elapsed
            if job.left <= 1e-9:
                done.append((i, job))
                lane.running = None
        self._start(changed=bool(done))
        self._delay(self._host_s * sum(job.num_rows for _, job in done))
        return done

    def _delay(self, host_s: float) -> None:
        for lane in self._lanes:
            if host_s and (job := lane.running) is not None:
                job.left += host_s * job.share / job.full_s

    def _start(self, *, changed: bool = False) -> None:
        for lane in self._lanes:
            if lane.running is None and lane.waiting and lane.waiting[0].ready_s <= self._now_s:
                lane.running = lane.waiting.popleft()
                lane.running.started_s = self._now_s
                changed = True
        if changed:
            self._set_speeds()

    def _set_speeds(self) -> None:
        running = [lane.running for lane in self._lanes if lane.running is not None]
        if len(running) == 1:
            (job,) = running
            job.full_s = job.noise * self._machine.alone_s(job.load, job.share)
        elif running:
            a, b = running
            a_s, b_s = self._machine.together_s(a.load, a.share, b.load, b.share)
            a.full_s, b.full_s = a.noise * a_s, b.noise * b_s

    def _factor(self) -> float:
        if not self._noise:
            return 1.0
        if not self._factors:
            self._factors = np.exp(self._noise * self._rng.standard_normal(_BATCH)).tolist()
        return self._factors.pop()
